"""The search of fixed ranks, on losses that can be written down."""

from __future__ import annotations

import itertools
import json

import pytest
from typer.testing import CliRunner

from pedyra.bench.pattern_search import changed, exchanges, search_pattern
from pedyra.bench.transfer import rot13
from pedyra.cli import app

COSTS = {"q": 2, "v": 2, "up": 5}
WEIGHTS = {"q": 0.1, "v": 2.0, "up": 1.0}


def _loss(pattern):
    """Every rank of a group halves what is left of its share."""
    return sum(weight * 0.5 ** pattern[group] for group, weight in WEIGHTS.items())


def _cost(pattern):
    return sum(COSTS[group] * rank for group, rank in pattern.items())


def test_it_finds_the_best_pattern_of_the_budget():
    start = {"q": 2, "v": 2, "up": 2}
    found = list(search_pattern(start, COSTS, _loss, rounds=9))
    everything = (dict(zip(WEIGHTS, ranks, strict=True)) for ranks in itertools.product(range(10), repeat=3))
    best = min((pattern for pattern in everything if _cost(pattern) <= 18), key=_loss)
    assert found[-1].pattern == best and found[-1].loss == _loss(best) and not found[-1].improved
    assert all(a.loss >= b.loss for a, b in itertools.pairwise(found))


def test_a_round_knows_what_a_rank_is_worth_and_asks_for_no_negative_rank():
    asked = []

    def evaluate(pattern):
        asked.append(dict(pattern))
        return _loss(pattern)

    first = next(search_pattern({"q": 0, "v": 3, "up": 1}, COSTS, evaluate, rounds=1, tries=1))
    assert first.gains == pytest.approx({"q": 0.05, "v": 0.125, "up": 0.25})
    assert first.losses == pytest.approx({"v": 0.25, "up": 0.5})
    assert all(rank >= 0 for pattern in asked for rank in pattern.values())
    assert len(asked) == 1 + 3 + 2 and not first.improved  # no exchange of one or two ranks should gain


def test_exchanges_stay_within_the_budget_and_begin_with_the_best():
    pattern, gains, losses = {"q": 2, "v": 2, "up": 2}, {"q": 0.0, "v": 3.0, "up": 1.0}, {"q": 0.1, "v": 9.0, "up": 9.0}
    found = exchanges(pattern, COSTS, gains, losses, spare=0)
    assert found[0] == {"q": -2, "v": 2}  # 3 * 1.6 - 0.1 * 2.6
    assert all(_cost(changed(pattern, change)) <= _cost(pattern) for change in found)
    assert exchanges(pattern, COSTS, dict.fromkeys(COSTS, 0.0), dict.fromkeys(COSTS, 1.0), spare=0) == []
    assert {"up": 1} in exchanges(pattern, COSTS, gains, losses, spare=5)


def test_the_command_names_a_contender_and_goes_on_from_its_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PEDYRA_CACHE", str(tmp_path))
    rows_file = tmp_path / "rows.jsonl"
    arguments = ["bench", "search", "--smoke", "--rounds", "1", "--target", "rot13", "--json", str(rows_file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "static:q=" in result.output
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    assert {row["base"].split("-")[1] for row in rows} == {rot13().digest}
    monkeypatch.setattr("pedyra.bench.bench_transfer.run_trial", lambda *a, **k: pytest.fail("made again"))
    assert CliRunner().invoke(app, arguments).output == result.output


def test_a_start_with_an_unknown_type_is_refused():
    result = CliRunner().invoke(app, ["bench", "search", "--smoke", "--start", "gate=3"])
    assert isinstance(result.exception, ValueError) and "types of layer are q, k, v, o" in str(result.exception)

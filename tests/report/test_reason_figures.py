"""Why ranks moved, or did not: the surest candidate against what would have gone for it, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pedyra.report.chart import Chart
from pedyra.report.reason_figures import Reason, reasons, reasons_of
from pedyra.report.run_folder import Run, read_run

# A rank of block.0.a costs 10 parameters, one of block.1.b 20.
A, B = "block.0.a", "block.1.b"
HEADER: dict[str, Any] = {
    "kind": "layers",
    "layers": [
        {"name": A, "type": "a", "depth": 0, "rank": 2, "in_features": 4, "out_features": 6},
        {"name": B, "type": "b", "depth": 1, "rank": 2, "in_features": 8, "out_features": 12},
    ],
    "budget": {"kind": "parameters", "parameters": 60},
    "schedule": {"total_steps": 100, "final_warmup": 20, "adjustments": [20, 50, 65]},
    "config": {"certainty": 2.0, "margin": 0.25},
}


def adjustment(step: int, ranks: tuple[int, int], added: dict, **measured: Any) -> dict[str, Any]:
    record = {"kind": "adjustment", "step": step, "ranks": {A: ranks[0], B: ranks[1]}, "pruned": [], "added": added}
    return {**record, "layer_scores": {A: 1.0, B: 1.0}, **measured}


def look(a: tuple[float, float], b: tuple[float, float], *trials: list) -> dict[str, Any]:
    """Gains of one error each: a loss of curvature 2 along every direction of a, and of 4 * 2 of b."""
    return {
        "gains": {A: [*a, 1.0], B: [*b, 4.0]},
        "trials": [list(trial) for trial in trials],
        "curvature": {A: 2.0, B: 2.0},
    }


ADJUSTMENTS = [
    # Surely (5^2 - 2^2) / 4 for 10, more than (8^2 - 2^2) / 16 for 20. Its 10 are paid by a's triple, worth
    # 1.5 * 2 / 2, for b's is worth 4 * 2 / 2 for 20, more per parameter.
    adjustment(20, (2, 2), {A: 1}, **look((5, 1), (8, 1), [B, 0, 3, 1, 1, 2], [A, 1, 1, 0.5, 1, 2])),
    # b's 20 are paid by both of a's: 1 * 4 / 2 and 4 * 2 / 2; a negative mean is worth its error alone.
    adjustment(50, (2, 2), {}, **look((1, 1), (6, 1), [A, 1, 3, 1, 1, 2], [A, 0, -2, 1, 1, 4])),
    # Too little on trial, and then nothing.
    adjustment(52, (2, 2), {}, **look((1, 1), (9, 1), [A, 1, 1, 0.5, 1, 2])),
    adjustment(55, (2, 1), {}, **look((5, 1), (1, 1))),
    # The 20 that b gave back pay for a triple of a.
    adjustment(65, (3, 1), {A: 1}, **look((5, 1), (1, 1))),
    adjustment(70, (3, 1), {}, **look((1, 1), (1, 1))),
]


@pytest.fixture
def run(lora_run: Path, tmp_path: Path):
    """run(adjustments, **changes of the header): a run folder with these adjustments, as the report reads it."""

    def make(adjustments=ADJUSTMENTS, **changes: Any) -> Run:
        for name in ("recipe.yaml", "metrics.jsonl"):
            (tmp_path / name).write_bytes((lora_run / name).read_bytes())
        lines = [{**HEADER, **changes}, *adjustments]
        (tmp_path / "ranks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return read_run(tmp_path)

    return make


def test_the_surest_candidate_is_set_against_the_triples_that_would_pay_for_it(run):
    first, second, unpaid, untried, spare, noise = reasons_of(run())
    assert first == Reason(20, A, 25 / 4, 21 / 4, 29 / 4, 0.25**2 * 1.5, [(A, 1)], True, True)
    # Half of the window is over: 0.25^0.5, squared.
    assert second == Reason(50, B, 36 / 16, 32 / 16, 40 / 16, 0.25 * (2 + 4), [(A, 0), (A, 1)], False, True)
    assert (untried.layer, untried.bar, untried.payers, untried.tried) == (A, None, [], False)
    assert (unpaid.layer, unpaid.bar, unpaid.payers, unpaid.tried) == (B, None, [], True)
    assert (spare.layer, spare.bar, spare.payers) == (A, 0, [])
    assert [reason.is_noise for reason in (first, second, unpaid, untried, spare, noise)] == [False] * 5 + [True]


def test_a_budget_of_ranks_counts_each_as_one(run):
    ranks = reasons_of(run(budget={"kind": "ranks", "parameters": 60}))
    assert (ranks[0].layer, ranks[0].payers) == (A, [(A, 1)])
    assert ranks[1].payers == [(A, 0)]


def test_a_gain_that_chance_may_show_is_surely_nothing(run):
    gains: Any = dict(look((5, 1), (16, 4), [B, 0, 3, 1, 1, 2], [A, 1, 1, 0.5, 1, 2]))
    for chance, layer, low in ((3.9, B, (256 - 64) / 16), (4.5, A, 21 / 4), (5.0, B, 0.0)):
        (reason,) = reasons_of(run([adjustment(20, (2, 2), {}, **gains, chance=chance)]))
        assert (reason.layer, reason.low, reason.is_noise) == (layer, low, low == 0)


def test_the_bar_is_at_least_what_is_worth_a_move(run):
    for least, bar in ((0.009, 0.25**2 * 1.5), (0.02, 0.2)):  # per unit of cost, of which a's triple takes 10
        (reason,) = reasons_of(run([{**ADJUSTMENTS[0], "least_gain": least}]))
        assert reason.bar == pytest.approx(bar)


def test_the_figure_tells_moved_from_stayed_and_says_why(run):
    figure = reasons([run()])
    assert figure is not None
    (panel,) = figure.panels
    assert isinstance(panel, Chart)
    moved, stayed, bars = panel.series
    assert (moved.x, stayed.x, bars.x) == ([20, 65], [50, 52, 55, 70], [20, 50])
    assert (moved.low, moved.high) == ([21 / 4, 21 / 4], [29 / 4, 29 / 4])
    assert bars.labels == ["bar, for a 0 (triple 1)", "bar, for a 0 (triple 0), a 0 (triple 1)"]
    told = "Ranks moved at 2 of 6 adjustments; at 1 the gain was not clear of noise, at 1 nothing was on trial, "
    assert told + "at 1 too little was on trial to pay for it, at 1 it did not clear the bar." in figure.caption


def test_a_deal_is_told_and_is_no_swap(run):
    dealt = adjustment(35, (1, 2), {A: 0}, dealt=True, **look((5, 1), (8, 1)))
    figure = reasons([run([ADJUSTMENTS[0], dealt])])
    assert figure is not None and isinstance(figure.panels[0], Chart)
    assert [x for series in figure.panels[0].series[:1] for x in series.x] == [20]
    assert (
        "Ranks moved at 1 of 1 adjustments. At step 35 all ranks were dealt anew, by what the triples" in figure.caption
    )


def test_a_run_that_measured_no_gains_or_no_trials_has_no_such_figure(run):
    by_score = [adjustment(20, (2, 2), {A: 1}, gains={A: [5, 1, 1], B: [6, 1, 1]})]
    assert reasons([run(by_score)]) is None
    assert reasons([run([adjustment(20, (2, 2), {A: 1})])]) is None
    assert reasons([run(config={})]) is None

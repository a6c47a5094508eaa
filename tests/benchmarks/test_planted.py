"""`python -m benchmarks.planted`: the problem has the ranks it says, and rows, table and figure say what was found."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.planted import (
    ARCHITECTURES,
    PLANTED_KEY,
    PROFILES,
    batches,
    bench_planted,
    every_method,
    make_problem,
    planted,
    profile_ranks,
    relative_error,
)
from benchmarks.rows import RowFile
from pedyra.methods.registry import METHODS

SHORT = 24
"""Steps."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("profile", [*PROFILES, "random"])
def test_a_profile_spends_the_budget_and_is_what_was_planted(profile, architecture):
    problem = make_problem(profile, seed=3, architecture=architecture, tail=0.0)
    assert sum(problem.true_ranks) == 48 and problem.true_ranks == profile_ranks(profile, 3)
    found = []
    for name in problem.layer_names:
        taught, base = dict(problem.teacher.named_parameters()), dict(problem.base.named_parameters())
        values = torch.linalg.svdvals(taught[f"{name}.weight"] - base[f"{name}.weight"])
        found.append(int((values > 0.1).sum()))  # planted ones are 0.5 to 1.5
        assert values[found[-1] :].max() < 1e-4
    assert tuple(found) == problem.true_ranks


def test_a_random_profile_is_that_of_its_seed():
    assert profile_ranks("random", 1) == profile_ranks("random", 1) != profile_ranks("random", 2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_error_is_one_for_the_base_and_zero_for_the_teacher(architecture):
    problem = make_problem("design", seed=0, architecture=architecture)
    assert relative_error(problem, problem.base) == 1 and relative_error(problem, problem.teacher) == 0
    x, target = next(batches(problem, 5, 128))
    assert x.shape == target.shape and x.numel() == 128 * 64


def test_every_layer_of_a_block_matters():
    problem = make_problem("uniform", seed=0, architecture="block", tail=0.0)
    for name in problem.layer_names:
        model = make_problem("uniform", seed=0, architecture="block", tail=0.0).teacher
        layer, base = model.get_submodule(name), problem.base.get_submodule(name)
        assert isinstance(layer, nn.Linear) and isinstance(base, nn.Linear)
        layer.weight.copy_(base.weight)
        assert relative_error(problem, model) > 0.002, name


def test_noise_is_relative_to_the_true_change():
    clean, noisy = (make_problem("design", seed=0, noise=noise) for noise in (0.0, 0.5))
    (x, target), (_, other) = next(batches(clean, 5, 4096)), next(batches(noisy, 5, 4096))
    change = target - clean.base(x)
    assert float((other - target).std() / change.std()) == pytest.approx(0.5, rel=0.02)


def test_smoke_writes_a_row_for_every_method(tmp_path, call):
    file = tmp_path / "rows.jsonl"
    code, out, _ = call(planted, "--smoke", "--json", str(file))
    assert code == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["method"] for row in rows] == every_method()
    assert len(rows) == len(METHODS)  # without qlora, and with the oracle
    for row in rows:
        assert 0 < row["relative_error"] < 1.05 and row["profile"] == "design"
        if row["ranks"] is None:
            assert row["method"] == "randlora" and row["rank_distance"] is None
            continue
        # RaSA saves a copy of the pool per layer, and GoRA rounds the share of each of the twelve.
        assert sum(row["ranks"]) <= 48 + (6 if row["method"] == "gora" else 0) or row["method"] == "rasa"
        # A rank of a layer has 64 + 64 parameters, and a DoRA has 64 more.
        assert row["parameters"] == 128 * sum(row["ranks"]) + 64 * 12 * (row["method"] == "dora")
        wrong = sum(abs(rank - true) for rank, true in zip(row["ranks"], row["true_ranks"], strict=True)) / 2
        assert row["rank_distance"] == wrong
    by_method = {row["method"]: row for row in rows}
    assert by_method["lora"]["ranks"] == [4] * 12 and by_method["oracle"]["rank_distance"] == 0
    assert len(out.splitlines()) == len(rows)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("lora+:ratio=-1", "ratio is -1; it must be at least 1"),
        ("prune:budget=ranks,moves=3", "moves is no setting of method prune"),
    ],
)
def test_what_a_method_refuses_is_told(method, told):
    with pytest.raises(ValueError, match=told):
        next(bench_planted([method], steps=SHORT))


def test_rows_are_not_made_twice(tmp_path, monkeypatch):
    def run():
        file = RowFile(tmp_path / "rows.jsonl", PLANTED_KEY)
        problems: dict[str, Any] = dict(profiles=["linear"], seeds=[1], noises=[0.0, 0.5], steps=SHORT)
        return list(bench_planted(["lora", "oracle"], **problems, file=file))

    first = run()
    monkeypatch.setattr("benchmarks.planted._run", lambda *a, **k: pytest.fail("made again"))
    assert run() == first and len(first) == 4


def test_rank_settings_reach_the_method():
    rows = list(bench_planted(["pedyra:moves=0", "pedyra:moves=1"], steps=SHORT))
    assert rows[0]["adjustments"] == 0 < rows[1]["adjustments"]


def test_a_run_that_diverges_ends_at_the_budget_too():
    for row in bench_planted(["lora", "sora", "dylora"], lrs=[1e30], architectures=["block"], steps=SHORT):
        assert row["relative_error"] is None and sum(row["ranks"]) <= 48


def test_every_method_sees_the_same_batches_whatever_ran_before_it():
    def error(methods):
        return list(bench_planted(methods, steps=SHORT))[-1]["relative_error"]

    assert error(["oracle", "pissa", "lora"]) == error(["lora"])

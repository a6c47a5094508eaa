"""`pedyra bench planted`: the problem has the ranks it says, and the rows say what was found."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from pedyra.cli import app
from pedyra.experiments.bench_planted import CONTENDERS, bench_planted, relative_error
from pedyra.experiments.planted import PROFILES, make_problem, profile_ranks


@pytest.mark.parametrize("profile", [*PROFILES, "random"])
def test_a_profile_spends_the_budget_and_is_what_was_planted(profile):
    problem = make_problem(profile, seed=3, tail=0.0)
    assert sum(problem.true_ranks) == 48 and problem.true_ranks == profile_ranks(profile, 3)
    found = [
        int(torch.linalg.matrix_rank(teacher.weight - base.weight, rtol=1e-3)) if rank else 0
        for base, teacher, rank in zip(problem.base.layers, problem.teacher.layers, problem.true_ranks, strict=True)
    ]
    assert tuple(found) == problem.true_ranks


def test_the_error_is_one_for_the_base_and_zero_for_the_teacher():
    problem = make_problem("design", seed=0)
    assert relative_error(problem, problem.base) == 1 and relative_error(problem, problem.teacher) == 0


def test_smoke_writes_a_row_for_every_method(tmp_path):
    file = tmp_path / "rows.jsonl"
    result = CliRunner().invoke(app, ["bench", "planted", "--smoke", "--json", str(file)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["method"] for row in rows] == list(CONTENDERS)
    for row in rows:
        assert 0 < row["relative_error"] < 1
        wrong = sum(abs(rank - true) for rank, true in zip(row["ranks"], row["true_ranks"], strict=True)) / 2
        assert row["rank_distance"] == wrong
    by_method = {row["method"]: row for row in rows}
    assert by_method["lora"]["ranks"] == [4] * 12 and by_method["oracle"]["rank_distance"] == 0
    assert sum(by_method["pedyra-gradient"]["ranks"]) == 48 and sum(by_method["adalora"]["ranks"]) == 48


def test_an_unknown_method_is_told_with_those_there_are():
    with pytest.raises(ValueError, match="'lorra' is not in bench planted; choose from lora, random"):
        next(bench_planted(["lorra"], ["design"], seeds=[0]))

"""How often a fit keeps its promise: counted on a run, and on losses that are written by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from benchmarks import bound
from benchmarks.bound import BOUND_KEY, Population, bench_bound
from pedyra.app.recipe import Recipe
from pedyra.app.runs.run import train_run
from pedyra.fitting.verdict import Candidate


class HandMadeLadder:
    """Sizes of 100, 99, ... 1 of 100 parameters."""

    parameters = list(range(100, 0, -1))

    def at(self, share: float) -> int:
        return next((i for i, count in enumerate(self.parameters) if count <= max(1, 100 * share)), 99)

    def share(self, index: int) -> float:
        return self.parameters[index] / 100

    def is_whole(self, index: int) -> bool:
        return self.parameters[index] == 100

    def point(self, index: int) -> Candidate:
        return Candidate(ranks={"layer": 100 - index}, parameters=100 - index, share=self.share(index), predicted=0.0)


def population(cost: Any) -> Population:
    """Forty batches whose loss rises by `cost(share)` and a noise that differs from batch to batch."""
    noise = [0.01 * (-1) ** i for i in range(40)]
    trained: Any = SimpleNamespace(ladder=HandMadeLadder(), weights=[1.0] * 40, whole=[1.0] * 40, model=None)
    trained.losses = lambda disabled: [2.0] * 40
    trained.losses_at = lambda ranks: [1.0 + cost(ranks["layer"] / 100) + each for each in noise]
    return Population(trained)


def test_a_size_is_taken_that_costs_what_may_be_given_up():
    share, increase, limit = population(lambda share: 0.2 * (1 - share)).fit(0, tolerance=0.1)
    assert limit == pytest.approx(0.1) and increase == pytest.approx(0.2 * (1 - share))
    assert 0.5 <= share < 0.75 and increase <= limit


def test_nothing_is_taken_where_every_size_costs_more():
    assert population(lambda share: 0.5).fit(0, tolerance=0.1)[0] == 1.0


def test_a_run_is_fitted_with_rows_of_each_fits_own(tmp_path):
    recipe = {
        "name": "tiny", "output_dir": str(tmp_path / "run"), "method": "lora", "model": {"name": "tiny-bert"},
        "data": {"source": "toy", "max_length": 40, "train_rows": 256, "eval_rows": 128}, "lora": {"r": 2},
        "training": {"max_steps": 40, "per_device_train_batch_size": 16, "learning_rate": 0.01,
                     "save_strategy": "no", "use_cpu": True},
    }  # fmt: skip
    train_run(Recipe.model_validate(recipe), console=Console(quiet=True))
    (row,) = bench_bound([tmp_path / "run"], fits=10, tolerance=0.5)
    assert set(BOUND_KEY) <= row.keys()
    assert row["fits"] == 10 and 0 <= row["within"] <= 10
    assert 0 < row["least_share"] <= row["share"] <= row["most_share"] <= 1


def test_too_few_held_out_batches_of_any_run_are_told_first(monkeypatch):
    tasks = {"many": 33, "few": 32}
    monkeypatch.setattr(bound, "opened", lambda run: (None, SimpleNamespace(eval=range(tasks[run.name]))))
    with pytest.raises(ValueError, match="runs/few has 4 batches of 8 held-out rows, and a fit takes 4 for the proof"):
        next(bench_bound([Path("runs/many"), Path("runs/few")]))


def test_what_is_no_run_is_told_first(tmp_path):
    with pytest.raises(ValueError, match="is no run folder"):
        next(bench_bound([tmp_path]))

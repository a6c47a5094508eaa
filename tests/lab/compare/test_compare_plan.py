"""A dry run tells the runs, those that are done, and how long the others train."""

from __future__ import annotations

from pathlib import Path

import pytest

from pedyra.lab.compare.compare import compare_experiment, open_experiment
from pedyra.lab.compare.grid import load_grid
from pedyra.lab.compare.plan import Plan, plan_experiment

SMOKE = Path(__file__).parents[3] / "recipes" / "compare_smoke.yaml"


def plan(tmp_path: Path, *overrides: str) -> Plan:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    return plan_experiment(open_experiment(load_grid(SMOKE, [f"output_dir={folder}", *overrides])))


def test_the_runs_are_counted_and_their_hours_go_with_steps_rows_and_tokens(tmp_path):
    whole = plan(tmp_path)  # lora has two rates to choose from, and two seeds; pedyra and randlora have two seeds
    assert (whole.runs, whole.done) == (8, 0)
    assert plan(tmp_path, "training.max_steps=48").gpu_hours == pytest.approx(2 * whole.gpu_hours)
    assert plan(tmp_path, "training.gradient_accumulation_steps=2").gpu_hours == pytest.approx(2 * whole.gpu_hours)
    assert plan(tmp_path, "tasks.toy.max_length=96").gpu_hours == pytest.approx(2 * whole.gpu_hours)
    # 64 rows in batches of 8, three times: 24 steps too.
    assert plan(tmp_path, "training.max_steps=-1", "training.num_train_epochs=3").gpu_hours == whole.gpu_hours
    one = plan(tmp_path, "methods=[pedyra]", "seeds=[0]")
    assert one.runs == 1 and one.gpu_hours == pytest.approx(whole.gpu_hours / 8)
    assert one + one == Plan(2, 0, 2 * one.gpu_hours)


def test_what_is_done_takes_nothing(make_grid):
    compare_experiment(open_experiment(make_grid()))
    assert plan_experiment(open_experiment(make_grid())) == Plan(10, 10, 0.0)

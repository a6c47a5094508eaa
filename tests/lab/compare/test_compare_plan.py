"""A dry run tells the runs, those that are done, and how long the others train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pedyra.lab.compare.compare import compare_experiment, open_experiment
from pedyra.lab.compare.grid import load_grid
from pedyra.lab.compare.plan import START_SECONDS, TERAFLOPS, Plan, plan_experiment, teraflops_here

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
    assert one + one == Plan(2, 0, 2 * one.gpu_hours, 2 * one.seconds_here)


def test_the_minutes_of_this_machine_go_with_its_rate_in_the_dtype_of_the_run(monkeypatch, tmp_path):
    rates = {torch.float32: 1e-6, torch.bfloat16: 4e-6}
    monkeypatch.setattr("pedyra.lab.compare.plan.teraflops_here", rates.__getitem__)
    plans = {bf16: plan(tmp_path, "training.use_cpu=true", f"training.bf16={bf16}") for bf16 in ("false", "true")}
    trained = {bf16: each.seconds_here - 8 * START_SECONDS for bf16, each in plans.items()}
    assert trained["false"] == pytest.approx(plans["false"].gpu_hours * 3600 * TERAFLOPS / 1e-6)
    assert trained["true"] == pytest.approx(trained["false"] / 4)
    assert f"{plans['true'].seconds_here / 60:,.0f} minutes on this machine" in str(plans["true"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_of_this_machine_is_one(dtype):
    assert 1e-4 < teraflops_here(dtype) < 1000


def test_what_is_done_takes_nothing(make_grid):
    compare_experiment(open_experiment(make_grid()))
    assert plan_experiment(open_experiment(make_grid())) == Plan(10, 10, 0.0, 0.0)

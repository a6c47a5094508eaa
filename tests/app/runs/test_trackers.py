"""Ranks, parameters and importance reach every tracker that Trainer logs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from short_runs import run
from works_with import note

from pedyra.lora.files import read_rows
from pedyra.lora.layer_names import layer_place

KEYS = ("ranks/total", "ranks/parameters", "ranks/mean_attention.self.query", "scores/mean_attention.self.query")
"""Some of the numbers that are told; every module type has its own."""
# What the libraries of trackers warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def tracked(recipe: Any, tmp_path: Path, monkeypatch: Any):
    """tracked(tracker): a run of PE-DyRA, told to that tracker offline; the result."""

    def train(tracker: str) -> Any:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
        made = recipe(
            "pedyra",
            training={"report_to": tracker, "run_name": "toy", "logging_steps": 1},
        )
        return run(made)

    return train


def last_told(result: Any) -> dict[str, float]:
    """The numbers of the last log, from the run's own file."""
    rows = [row for row in read_rows(result.folder.metrics) if "loss" in row]
    return {key: next(row[key] for row in reversed(rows) if key in row) for key in KEYS}


def test_every_module_type_has_a_rank_and_an_importance(recipe: Any):
    result = run(recipe("pedyra", training={"logging_steps": 1}))
    kinds = {layer_place(layer["layer"])[0] for layer in result.layers}
    rows = [row for row in read_rows(result.folder.metrics) if "scores/mean" in row]
    assert rows and all(
        {f"{of}/mean_{kind}" for of in ("ranks", "scores") for kind in kinds} <= set(row) for row in rows
    )
    # The mean over all layers lies between those of the types.
    means = [rows[-1][f"scores/mean_{kind}"] for kind in kinds]
    assert min(means) <= rows[-1]["scores/mean"] <= max(means)


def test_tensorboard(tracked: Any, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = tracked("tensorboard")
    scalars = {}
    for file in (tmp_path / "run" / "runs").rglob("events.out.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        scalars |= {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    for key, value in last_told(result).items():
        assert scalars[f"train/{key}"] == pytest.approx(value, rel=1e-6)
    note("tool", "TensorBoard", "tensorboard", run="works")


def test_wandb(tracked: Any):
    wandb = pytest.importorskip("wandb")
    result = tracked("wandb")
    summary = dict(wandb.run.summary)
    for key, value in last_told(result).items():
        assert summary[f"train/{key}"] == pytest.approx(value, rel=1e-6)
    wandb.finish()
    note("tool", "W&B, offline", "wandb", run="works")


def test_mlflow(tracked: Any):
    mlflow = pytest.importorskip("mlflow")
    result = tracked("mlflow")
    client, last = mlflow.MlflowClient(), mlflow.last_active_run()
    metrics = client.get_run(last.info.run_id).data.metrics
    for key, value in last_told(result).items():
        assert metrics[key] == pytest.approx(value, rel=1e-6)
    assert mlflow.active_run() is None  # no run is left open
    note("tool", "MLflow", "mlflow-skinny", run="works")


def test_trackio(tracked: Any, tmp_path: Path):
    pytest.importorskip("trackio")
    result = tracked("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("huggingface", "toy")
    told: dict[str, Any] = {key: value for row in logs for key, value in row.items()}
    for key, value in last_told(result).items():
        assert told[f"train/{key}"] == pytest.approx(value, rel=1e-6)
    note("tool", "trackio", "trackio", run="works")

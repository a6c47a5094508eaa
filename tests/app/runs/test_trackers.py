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


def of_tensorboard(folder: Path) -> dict[str, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (folder / "run" / "runs").rglob("events.out.*")
    events = EventAccumulator(str(file))
    events.Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


def of_wandb(folder: Path) -> dict[str, float]:
    import wandb

    summary = dict(wandb.run.summary)  # type: ignore[union-attr]
    wandb.finish()
    return summary


def of_mlflow(folder: Path) -> dict[str, float]:
    import mlflow

    assert mlflow.active_run() is None  # no run is left open
    last: Any = mlflow.last_active_run()
    return {
        f"train/{key}": value for key, value in mlflow.MlflowClient().get_run(last.info.run_id).data.metrics.items()
    }


def of_trackio(folder: Path) -> dict[str, float]:
    from trackio.sqlite_storage import SQLiteStorage

    return {key: value for row in SQLiteStorage.get_logs("huggingface", "toy") for key, value in row.items()}


@pytest.mark.parametrize(
    ("tracker", "title", "package", "read"),
    [
        ("tensorboard", "TensorBoard", "tensorboard", of_tensorboard),
        ("wandb", "W&B, offline", "wandb", of_wandb),
        ("mlflow", "MLflow", "mlflow-skinny", of_mlflow),
        ("trackio", "trackio", "trackio", of_trackio),
    ],
)
def test_a_tracker_gets_what_is_logged(tracked: Any, tracker: str, title: str, package: str, read: Any, tmp_path: Path):
    pytest.importorskip(tracker)
    result = tracked(tracker)
    told = read(tmp_path)
    for key, value in last_told(result).items():
        assert told[f"train/{key}"] == pytest.approx(value, rel=1e-6)
    note("tool", title, package, run="works")

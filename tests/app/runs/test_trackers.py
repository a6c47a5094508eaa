"""Ranks, parameters and importance in every tracker, with the map of the ranks and the curve of the fit as images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from short_runs import run
from works_with import note

from pedyra.allocate.callback import RankCallback
from pedyra.app.runs.trackers import TrackerImages
from pedyra.lora.files import read_rows
from pedyra.lora.layer_names import layer_place

KEYS = ("ranks/total", "ranks/parameters", "ranks/mean_attention.self.query", "scores/mean_attention.self.query")
"""Some of the numbers that are told; every module type has its own."""
# What the libraries of trackers warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def tracked(recipe: Any, tmp_path: Path, monkeypatch: Any):
    """tracked(tracker): a run of PE-DyRA with a fit, told to that tracker offline; the result."""

    def train(tracker: str) -> Any:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
        made = recipe(
            "pedyra",
            data={"eval_rows": 48},
            training={"report_to": tracker, "run_name": "toy", "per_device_eval_batch_size": 2, "logging_steps": 1},
            fit={"parameters": 2000, "rows": 32},
        )
        return run(made)

    return train


def last_told(result: Any) -> dict[str, float]:
    """The numbers of the last log, from the run's own file."""
    rows = [row for row in read_rows(result.folder.metrics) if "loss" in row]
    return {key: next(row[key] for row in reversed(rows) if key in row) for key in KEYS}


def check_image(data: bytes) -> None:
    """A drawn chart and no blank one: many colours, on white."""
    with Image.open(io.BytesIO(data)) as image:
        assert min(image.size) > 100
        colours = image.convert("RGB").getcolors(1 << 24)
    assert colours is not None and len(colours) > 10 and max(colours)[1] == (255, 255, 255)


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
    scalars, images = {}, {}
    for file in (tmp_path / "run" / "runs").rglob("events.out.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        scalars |= {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
        images |= {tag: events.Images(tag)[-1].encoded_image_string for tag in events.Tags()["images"]}
    for key, value in last_told(result).items():
        assert scalars[f"train/{key}"] == pytest.approx(value, rel=1e-6)
    assert images.keys() == {"ranks", "fit"}
    for data in images.values():
        check_image(data)
    note("tool", "TensorBoard", "tensorboard", run="works")


def test_wandb(tracked: Any, tmp_path: Path):
    wandb = pytest.importorskip("wandb")
    result = tracked("wandb")
    summary = dict(wandb.run.summary)
    for key, value in last_told(result).items():
        assert summary[f"train/{key}"] == pytest.approx(value, rel=1e-6)
    wandb.finish()
    files = {path.name.split("_")[0]: path for path in tmp_path.rglob("*.png") if "media" in path.parts}
    assert files.keys() == {"ranks", "fit"}
    for path in files.values():
        check_image(path.read_bytes())
    note("tool", "W&B, offline", "wandb", run="works")


def test_mlflow(tracked: Any, tmp_path: Path):
    mlflow = pytest.importorskip("mlflow")
    result = tracked("mlflow")
    client, last = mlflow.MlflowClient(), mlflow.last_active_run()
    metrics = client.get_run(last.info.run_id).data.metrics
    for key, value in last_told(result).items():
        assert metrics[key] == pytest.approx(value, rel=1e-6)
    assert mlflow.active_run() is None  # no run is left open
    for name in ("ranks.png", "fit.png"):
        check_image(Path(client.download_artifacts(last.info.run_id, name, str(tmp_path))).read_bytes())
    note("tool", "MLflow", "mlflow-skinny", run="works")


def test_trackio(tracked: Any, tmp_path: Path):
    trackio = pytest.importorskip("trackio")
    result = tracked("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("huggingface", "toy")
    told: dict[str, Any] = {key: value for row in logs for key, value in row.items()}
    for key, value in last_told(result).items():
        assert told[f"train/{key}"] == pytest.approx(value, rel=1e-6)
    assert {"ranks", "fit"} <= told.keys()
    folder = Path(trackio.utils.MEDIA_DIR)  # read when it was imported
    for name in ("ranks", "fit"):
        check_image((folder / told[name]["file_path"]).read_bytes())
    note("tool", "trackio", "trackio", run="works")


def test_a_tracker_that_refuses_an_image_does_not_end_the_run(recipe: Any, monkeypatch: Any):
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_image", refuse)
    with pytest.warns(UserWarning, match="TensorBoard took no image 'ranks': ConnectionError: no server"):
        result = run(recipe("pedyra", training={"report_to": "tensorboard"}))
    assert result.step == 12 and result.final is not None


def test_in_a_trainer_of_ones_own(make_bert: Any, tmp_path: Path):
    from classifier_rows import rows
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import Trainer, TrainingArguments

    import pedyra

    args = TrainingArguments(
        str(tmp_path), max_steps=20, learning_rate=1e-2, use_cpu=True, report_to="tensorboard", save_strategy="no"
    )
    images, config = TrackerImages(), pedyra.PeDyra(interval=4, initial_warmup=2, final_warmup=4, moves=2)
    trainer = Trainer(
        make_bert(),
        args,
        train_dataset=rows(64, 1),
        eval_dataset=rows(48, 2),
        callbacks=[images, RankCallback(config)],  # before what moves the ranks
    )
    trainer.train()
    images.log_curve(pedyra.fit(trainer, parameters=200, rows=48))
    tags = set()
    for file in (tmp_path / "runs").rglob("events.out.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        tags |= set(events.Tags()["images"])
    assert tags == {"ranks", "fit"}

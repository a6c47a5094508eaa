"""Images for TensorBoard, W&B, MLflow and trackio: the ranks at the end of a training, and the curve of its fit.

The numbers (ranks, parameters, importance) go by way of Trainer's own log, which every tracker reads; see RankCallback.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from pedyra.allocate.callback import RankCallback
from pedyra.allocate.trainer import caller
from pedyra.app.report.chart import Spec, rank_map
from pedyra.app.report.figures import increase_curve, map_cells
from pedyra.app.report.images import save_image
from pedyra.app.runs.setup import layer_rows
from pedyra.fitting.result import Fit
from pedyra.lora.layer_names import layer_place


class TrackerImages(TrainerCallback):
    """Sends the map of the ranks to the trackers of a Trainer when training ends, and then, by `log_curve`, a fit.

    A tracker that refuses an image is told of in a warning, and the training is what it was.
    """

    def __init__(self) -> None:
        self._trackers: list[Any] = []
        self._start: dict[str, int] = {}
        self._step = 0
        self._args: TrainingArguments | None = None
        self._trackio_run: str | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        handler = caller(CallbackHandler)
        if handler is None:
            return
        # Trackers end their runs when training ends, so this comes before them; but after what moves ranks.
        handler.callbacks.remove(self)
        handler.callbacks.insert(sum(isinstance(each, RankCallback) for each in handler.callbacks), self)
        kinds = tuple(_SENDERS)
        self._trackers = [each for each in handler.callbacks if isinstance(each, kinds)]
        if not state.is_world_process_zero:
            self._trackers = []
        self._args, self._start = args, _ranks(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step, ranks = state.global_step, _ranks(kwargs["model"])
        for tracker in self._trackers:
            if isinstance(tracker, TrackioCallback):  # which forgets its run
                import trackio

                run = trackio.context_vars.current_run.get()  # pyright: ignore
                self._trackio_run = None if run is None else run.name
        if ranks:
            start = {name: self._start.get(name, 0) for name in ranks}
            cells = map_cells({name: layer_place(name) for name in ranks}, [start, ranks])
            self._send("ranks", {**rank_map(cells, at="1"), "width": {"step": 30}, "height": {"step": 24}})

    def log_curve(self, found: Fit) -> None:
        """Send the curve of a fit, once training has ended."""
        rows = found.curve_rows()
        if any(row["share"] < 1 for row in rows):
            self._send("fit", {**increase_curve(rows), "width": 520, "height": 240})

    def _send(self, name: str, spec: Spec) -> None:
        if not self._trackers:
            return
        for tracker in self._trackers:
            send = next(send for kind, send in _SENDERS.items() if isinstance(tracker, kind))
            try:
                send(self, tracker, name, _drawn(spec))
            except Exception as error:  # of a tracker's server, or of what draws: the run itself is whole
                title = type(tracker).__name__.removesuffix("Callback")
                warnings.warn(f"{title} took no image {name!r}: {type(error).__name__}: {error}", stacklevel=3)

    def _to_tensorboard(self, tracker: Any, name: str, image: np.ndarray) -> None:
        opened = tracker.tb_writer is None
        writer = tracker._SummaryWriter(log_dir=tracker.logging_dir) if opened else tracker.tb_writer
        writer.add_image(name, image, self._step, dataformats="HWC")
        writer.flush()
        if opened:
            writer.close()

    def _to_wandb(self, tracker: Any, name: str, image: np.ndarray) -> None:
        import wandb

        if wandb.run is not None:  # pyright: ignore
            wandb.log({name: wandb.Image(image), "train/global_step": self._step})  # pyright: ignore

    def _to_mlflow(self, tracker: Any, name: str, image: np.ndarray) -> None:
        import mlflow

        run = mlflow.active_run() or mlflow.last_active_run()  # pyright: ignore
        if run is not None:
            mlflow.MlflowClient().log_image(run.info.run_id, image, artifact_file=f"{name}.png")  # pyright: ignore

    def _to_trackio(self, tracker: Any, name: str, image: np.ndarray) -> None:
        import trackio

        ended = not tracker._initialized
        if ended:
            args: Any = self._args
            trackio.init(  # pyright: ignore
                project=args.project, name=self._trackio_run, space_id=args.trackio_space_id, resume="must"
            )
        trackio.log({name: trackio.Image(image)})  # pyright: ignore
        if ended:
            trackio.finish()  # pyright: ignore


_SENDERS: dict[type[TrainerCallback], Callable[[TrackerImages, Any, str, np.ndarray], None]] = {
    TensorBoardCallback: TrackerImages._to_tensorboard,
    WandbCallback: TrackerImages._to_wandb,
    MLflowCallback: TrackerImages._to_mlflow,
    TrackioCallback: TrackerImages._to_trackio,
}


def _ranks(model: Any) -> dict[str, int]:
    return {row["layer"]: row["rank"] for row in layer_rows(model)}


def _drawn(spec: Spec) -> np.ndarray:
    """The chart as an image, `(height, width, 3)`."""
    from PIL import Image  # which every tracker that takes an image brings along

    with TemporaryDirectory() as scratch:
        path = Path(scratch, "drawn.png")
        save_image(spec, path)
        with Image.open(path) as opened:
            return np.asarray(opened.convert("RGB"))

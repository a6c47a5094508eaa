"""A trained LoRA whose cuts a benchmark measures: a finished run with its base, and held-out batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from pedyra.app.models.base import positions
from pedyra.app.recipe import Recipe
from pedyra.app.runs.evaluate import adapted_model, finished_run, load_rows
from pedyra.app.tasks.task import Task, load_task
from pedyra.errors import UserError
from pedyra.fitting.calibration import calibrate, lora_layers
from pedyra.fitting.choice import Choice, choosing
from pedyra.fitting.judge import Batch, Cut, Judge, model_loss
from pedyra.fitting.logits import Logits, answer_logits
from pedyra.fitting.modes import disabled, evaluating
from pedyra.fitting.paired import paired
from pedyra.lora.folder import read_adapter_config

BATCH = 8
"""Rows of a batch: losses are paired batch by batch, so small ones make a better standard error."""


class TrainedLora:
    """The LoRA of a finished run with its base, and held-out batches to be judged by.

    Args:
        rows: of training, to calibrate with, at most; the default is that of `pedyra fit`.
        held_out: rows to be judged by, at most; None: all of them.
        data: as `opened`.
    """

    def __init__(self, run: Path, rows: int = 512, held_out: int | None = None, data: Path | None = None) -> None:
        self.run = run
        recipe, adapter, tokenizer, task = opened(run, data)
        self.model = adapted_model(recipe, adapter, task.num_labels, tokenizer)
        self.tokenizer = tokenizer
        precision = torch.autocast(self.model.device.type, torch.bfloat16, enabled=recipe.training.get("bf16", False))
        self.judge = _AnsweringJudge(self.model, precision(model_loss))
        self._task, self._seed, self._positions = task, recipe.seed, positions(recipe.model)
        self._every = recipe.data.model_copy(update={"train_rows": None})
        self._collate = task.collator
        generator = torch.Generator().manual_seed(recipe.seed)

        def batches(part: Any, count: int) -> list[Any]:
            return self.batches_of(part, torch.randperm(len(part), generator=generator)[:count].tolist(), BATCH)

        self.training = batches(task.train, rows)
        self.batches = batches(task.eval, len(task.eval) if held_out is None else held_out)
        self.weights = [self.judge.samples(batch) for batch in self.batches]
        self.whole = self.losses()

    @cached_property
    def choice(self) -> Choice:
        """Calibrate on the rows of training as a fit does, and choose among the cuts of a size as it does."""
        calibrating = len(self.training) - choosing(len(self.training), 1)
        calibration = calibrate(self.judge, self.training[:calibrating])
        return Choice(self.judge, calibration, self.training[calibrating:], "default", mixed=True)

    def base_losses(self) -> list[float]:
        """Return that of each held-out batch with the adapter switched off."""
        return self.losses(partial(disabled, self.model))

    def unseen(self) -> Any:
        """Return the rows of the run's own data, tokenised, that it was neither trained on nor judged by."""
        task = self._task
        training_rows = {str(row) for part in (task.train, task.eval) for row in part}
        every = load_task(self._every, self.tokenizer, self._seed, self._positions).train
        return every.select([place for place, row in enumerate(every) if str(row) not in training_rows])

    def batches_of(self, rows: Any, places: Sequence[int], size: int) -> list[Any]:
        """Return these rows, in their order, as batches of `size`."""
        loader = DataLoader(rows.select(places), batch_size=size, collate_fn=lambda batch: dict(self._collate(batch)))
        return list(loader)

    @property
    def parameters(self) -> int:
        """Count those of all factors A and B."""
        slots = [(module.lora_A["default"], module.lora_B["default"]) for module in lora_layers(self.model).values()]
        return sum(A.weight.numel() + B.weight.numel() for A, B in slots)

    def losses(self, cut: Cut | None = None) -> list[float]:
        """Return that of each held-out batch, with the model that `cut` makes; default: the adapter as trained."""
        return list(self.judge.losses(self.batches, cut or (lambda: evaluating(self.model))))

    def mean(self, losses: Sequence[float]) -> float:
        """Average over the samples of all held-out batches."""
        return paired([0.0] * len(losses), losses, self.weights).mean


class _AnsweringJudge(Judge):
    """Judges by the loss, and answers by the logits of the model."""

    def answers(self, batch: Batch) -> Logits | None:
        return answer_logits(self.model, batch, self.model(**batch).logits)


def opened(run: Path, data: Path | None = None) -> tuple[Recipe, Path, Any, Task]:
    """Return the recipe of a finished run, its adapter folder, its tokenizer and its task.

    Args:
        data: a folder that has the files of the run's rows, though they may have been elsewhere when it was trained.

    Raises:
        ValueError: it is no finished run, its adapter is no LoRA, or its rows are not those that it was trained on.
    """
    folder, recipe, adapter = finished_run(run)
    if (kind := read_adapter_config(adapter)["peft_type"]) != "LORA":
        raise UserError(
            f"{run} has an adapter of type {kind}, and what is cut is a LoRA; give the run of another method"
        )
    if data is not None:
        files = {key: data / Path(getattr(recipe.data, key) or "").name for key in ("source", "validation")}
        paths = {key: str(file) for key, file in files.items() if file.is_file()}
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=paths)})
    tokenizer, task = load_rows(recipe, folder.path)
    return recipe, adapter, tokenizer, task

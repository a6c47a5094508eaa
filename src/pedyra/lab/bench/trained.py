"""The LoRA of a finished run, with its base, rows to calibrate with, and held-out batches to be judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from pedyra.app.models import load_tokenizer, positions
from pedyra.app.runs.evaluate import adapted_model, finished_run
from pedyra.app.tasks import Task, load_task
from pedyra.fitting.calibration import evaluating, lora_layers
from pedyra.fitting.judge import Batch, Cut, Judge

BATCH = 8
"""Rows of a batch: losses are paired batch by batch, so small ones make a better standard error."""


class TrainedLora:
    """Loads a finished run.

    Args:
        rows: of training, to calibrate with, at most.
        held_out: rows to be judged by, at most; None: all of them.
    """

    def __init__(self, run: Path, rows: int, held_out: int | None = None) -> None:
        _, self.recipe, adapter = finished_run(run)
        tokenizer = load_tokenizer(self.recipe.model)
        task = load_task(self.recipe.data, tokenizer, self.recipe.seed, positions(self.recipe.model))
        self.model = adapted_model(self.recipe, adapter, task.num_labels, tokenizer)
        self.judge = Judge(self.model)
        count = len(task.eval) if held_out is None else held_out
        self.training, self.batches = _batches(task, calibration=rows, held_out=count, seed=self.recipe.seed)
        self.weights = [self.judge.samples(batch) for batch in self.batches]

    @property
    def parameters(self) -> int:
        """Of all factors A and B."""
        slots = [(module.lora_A["default"], module.lora_B["default"]) for module in lora_layers(self.model).values()]
        return sum(A.weight.numel() + B.weight.numel() for A, B in slots)

    def losses(self, cut: Cut | None = None) -> list[float]:
        """Of each held-out batch, with the model that `cut` makes; by default the adapter as it was trained."""
        return list(self.judge.losses(self.batches, cut or (lambda: evaluating(self.model))))


def _batches(task: Task, *, calibration: int, held_out: int, seed: int) -> tuple[DataLoader[Any], list[Batch]]:
    """Batches of so many training rows, and of so many that are held out."""
    generator = torch.Generator().manual_seed(seed)
    train = torch.randperm(len(task.train), generator=generator)[:calibration].tolist()
    held = torch.randperm(len(task.eval), generator=generator)[:held_out].tolist()

    def batches(part: Any) -> DataLoader[Any]:
        return DataLoader(part, batch_size=BATCH, collate_fn=lambda found: dict(task.collator(found)))

    return batches(task.train.select(train)), list(batches(task.eval.select(held)))

"""Batches of a task's training rows, for methods that look at the data before training."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from pedyra.recipe import Recipe
from pedyra.tasks import Task


def training_batches(task: Task, recipe: Recipe) -> DataLoader:
    """The training rows in batches of the recipe's size, shuffled with its seed; whole batches where there is one."""
    size = recipe.training["per_device_train_batch_size"]
    return DataLoader(
        task.train,  # type: ignore[arg-type]
        batch_size=size,
        shuffle=True,
        drop_last=len(task.train) >= size,
        collate_fn=lambda rows: dict(task.collator(rows)),
        generator=torch.Generator().manual_seed(recipe.seed),
    )

"""A Trainer says what training is to come, for a method that looks at it before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from pedyra.allocate.contract import BatchLoss, Training
from pedyra.errors import UserError
from pedyra.trainer.judge import TrainerJudge


def upcoming(trainer: Any) -> Training:
    """Return the training of a Trainer: its steps, and its loss on batches of its own training rows."""
    return Training(
        steps=partial(total_steps, trainer),
        batches=lambda: _batch_losses(trainer, _rows(trainer)),
        losses=partial(_losses, trainer),
    )


def total_steps(trainer: Any) -> int:
    """Count the optimizer steps of the training, by Trainer's rule."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


def _rows(trainer: Any) -> Any:
    if trainer.args.world_size > 1:
        raise UserError("a search before the training runs in one process; start one")
    if not hasattr(trainer.train_dataset, "__len__"):
        raise UserError("a search shuffles the training rows, and a stream has no end; give rows with a length")
    return trainer.train_dataset


def _losses(trainer: Any, part: float) -> tuple[Iterator[BatchLoss], Iterator[BatchLoss]]:
    rows = _rows(trainer)
    apart = round(len(rows) * part)
    if not 0 < apart < len(rows):
        raise UserError(
            f"a part of {part} for validation leaves one side of {len(rows)} training rows without any; give more rows"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(trainer.args.seed)).tolist()
    return _batch_losses(trainer, Subset(rows, order[apart:])), _batch_losses(trainer, Subset(rows, order[:apart]))


def _batch_losses(trainer: Any, rows: Any) -> Iterator[BatchLoss]:
    """Yield the loss on one batch after another, shuffled anew for every pass; whole batches where there is one."""
    args = trainer.args
    loader = DataLoader(
        rows,
        batch_size=args.per_device_train_batch_size,
        shuffle=True,
        drop_last=len(rows) >= args.per_device_train_batch_size,
        collate_fn=trainer._get_collator_with_removed_columns(trainer.data_collator, description="search"),
        generator=torch.Generator().manual_seed(args.seed),
    )
    while True:
        for batch in loader:
            yield partial(_loss, trainer, dict(batch))


def _loss(trainer: Any, batch: dict[str, Any], model: nn.Module) -> torch.Tensor:
    return TrainerJudge(trainer, model).trained_loss(batch)

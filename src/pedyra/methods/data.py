"""Training batches as plain values, for methods that look at the data before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pedyra.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Data:
    """A source of batches, and the loss of a model on one."""

    batches: Callable[[], Iterator[Any]]
    """Returns batches without end, and the same ones from the first on at every call."""
    loss: Callable[[nn.Module, Any], Tensor]
    """(model, batch) -> the mean loss."""
    split: Callable[[float], tuple[Data, Data]] | None = None
    """Returns two sources without a common row, the second of this part; None: no row comes twice, so that every other
    batch will do."""

    def parts(self, fraction: float) -> tuple[Data, Data]:
        """Return two sources for a search that trains on one and judges on the other. Raises ValueError: one of the two
        would have no row."""
        if self.split is not None:
            return self.split(fraction)
        first, second = (replace(self, batches=partial(self._every_other, start)) for start in (0, 1))
        return first, second

    def _every_other(self, start: int) -> Iterator[Any]:
        return islice(self.batches(), start, None, 2)


def model_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the loss that the model itself computes from a batch of keyword arguments."""
    device = next(model.parameters()).device
    return model(**{key: value.to(device) for key, value in batch.items()}).loss


def rows_data(rows: Any, collate: Callable[[list[Any]], Any], *, batch_size: int, seed: int) -> Data:
    """Make batches of a data set's rows, shuffled anew for every pass with the seed; whole ones where there is one.

    Args:
        rows: with `__len__`, `__getitem__` and `select(indices)`, as datasets.Dataset has them.
        collate: rows -> batch of keyword arguments of the model.
    """

    def batches() -> Iterator[Any]:
        loader = DataLoader(
            rows,
            batch_size=batch_size,
            shuffle=True,
            drop_last=len(rows) >= batch_size,
            collate_fn=lambda chosen: dict(collate(chosen)),
            generator=torch.Generator().manual_seed(seed),
        )
        while True:
            yield from loader

    def split(fraction: float) -> tuple[Data, Data]:
        held_out = round(len(rows) * fraction)
        if not 0 < held_out < len(rows):
            raise UserError(
                f"a part of {fraction} for validation leaves one side of {len(rows)} training rows without any; give "
                f"more rows"
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        first, second = (
            rows_data(rows.select(part), collate, batch_size=batch_size, seed=seed)
            for part in (order[held_out:], order[:held_out])
        )
        return first, second

    return Data(batches=batches, loss=model_loss, split=split)

"""The batch of a step, run once more: the loss with the adapter as it is, and with a part of it switched off."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pedyra.allocate.contract import Closure
from pedyra.allocate.distributed import Average
from pedyra.fit.calibration import evaluating
from pedyra.fit.verdict import paired
from pedyra.lora.layer import AdaptedLayer


@dataclass(frozen=True)
class _Call:
    """One training forward of the model."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    samples: Tensor
    autocast: tuple[bool, torch.dtype]
    has_loss: bool


class Batches:
    """Sees the forward passes of a step, which may be several, and runs them again.

    Args:
        average: over the processes that see parts of the batch.
    """

    def __init__(self, model: nn.Module, average: Average) -> None:
        self._model, self._average = model, average
        self._calls: list[_Call] = []
        self.wanted = False
        """Whether the passes of the next step are to be kept."""
        seen_by = weakref.WeakMethod(self._see)

        def see(*call: Any) -> None:  # a run that was broken off is not kept alive by its model
            if (method := seen_by()) is not None:
                method(*call)

        self._handle = model.register_forward_hook(see, with_kwargs=True)

    def _see(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if not self.wanted or not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return  # an evaluation, or the recomputation of a checkpoint
        loss = getattr(output, "loss", None)
        keywords = {key: value for key, value in keywords.items() if key != "num_items_in_batch"}
        samples = num_samples(keywords, output)
        kind = samples.device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self._calls.append(_Call(arguments, keywords, samples, autocast, isinstance(loss, Tensor)))

    @property
    def samples(self) -> Tensor:
        """Of the step so far, `()`; 0 where no forward was seen."""
        return torch.stack([call.samples for call in self._calls]).sum() if self._calls else torch.zeros(())

    def check(self, closure: Closure | None) -> None:
        """Raise ValueError where the loss of this step cannot be had again."""
        if closure is None and not (self._calls and all(call.has_loss for call in self._calls)):
            raise ValueError(
                "method pedyra compares losses with and without what may go, but the model's forward gives none; pass "
                "labels to the model, or closure=lambda: loss to before_step. A Trainer with a loss of its own (DPO): "
                "set rank.target_rank, which compares none"
            )

    def losses(self, closure: Closure | None, *without: Mapping[AdaptedLayer, Tensor]) -> tuple[list[float], float]:
        """The mean loss of this step's batch as the model is, then with each of these projections; and its samples.

        In evaluation mode, without a gradient; no weight and no random number of the run changes. Waits for the device.

        Args:
            without: layer -> what its A is multiplied with, `(r, r)`.
        """
        found = []
        with evaluating(self._model), torch.no_grad():
            found.append(self._loss(closure))
            for each in without:
                with projected(each):
                    found.append(self._loss(closure))
        samples = self.samples.to(found[0])
        # Processes may have seen other numbers of samples: the mean of all is weighted by them.
        sums = self._average(torch.stack([*(loss * samples for loss in found), samples]))
        *totals, count = sums.tolist()
        return [total / max(count, 1e-3) for total in totals], count

    def _loss(self, closure: Closure | None) -> Tensor:
        if closure is not None:
            return closure().detach().float()
        total: Any = 0.0
        for call in self._calls:
            enabled, dtype = call.autocast
            with torch.autocast(call.samples.device.type, dtype=dtype, enabled=enabled):
                loss = self._model(*call.arguments, **call.keywords).loss.float() * call.samples
                total = total + torch.where(call.samples > 0, loss, 0.0)  # the mean over no sample is no number
        return total / self.samples.clamp_min(1e-3)

    def forget(self) -> None:
        """The step is over."""
        self._calls = []

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()
        self._calls = []


def num_samples(keywords: Mapping[str, Any], output: Any) -> Tensor:
    """What the mean loss of a forward is a mean over, `()`: tokens that have a label, else tokens or rows that have
    an output. Nothing waits for the device."""
    labels = keywords.get("labels")
    if isinstance(labels, Tensor):
        if labels.dim() == 2 and not labels.is_floating_point():
            return (labels[:, 1:] != -100).sum().float()
        return torch.tensor(float(len(labels)), device=labels.device)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        logits = next(value for value in output.values() if isinstance(value, Tensor))
    return torch.tensor(float(logits.shape[:-1].numel()), device=logits.device)


@contextmanager
def projected(projections: Mapping[AdaptedLayer, Tensor]) -> Iterator[None]:
    """While it lasts, A of each layer is multiplied from the left by a projection `(r, r)`; then it is what it was."""
    before = [(layer.a.A, layer.a.A.detach().clone()) for layer in projections]
    with torch.no_grad():
        for (A, _), projection in zip(before, projections.values(), strict=True):
            A.copy_(projection.to(A.device, torch.float32) @ A.float())
        try:
            yield
        finally:
            for A, values in before:
                A.copy_(values)


def nothing(layers: Sequence[AdaptedLayer]) -> dict[AdaptedLayer, Tensor]:
    """The projections that switch all of these layers off."""
    return {layer: torch.zeros(layer.rank, layer.rank) for layer in layers}


def won(before: Sequence[Sequence[float]], now: Sequence[Sequence[float]]) -> list[float] | None:
    """What fine-tuning has won of the loss, and its standard error; None where too few batches were seen.

    The smaller of two: the fall of the loss since the beginning, in which a trained head has its part, and what the
    loss rises by without the adapter, to which a trained head has grown used. Batches tell nothing that have no sample,
    or a loss that is not finite.
    """
    before, now = ([row for row in rows if math.isfinite(sum(row)) and row[-1] > 0] for rows in (before, now))
    if len(before) < 2 or len(now) < 2:
        return None

    def mean(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
        return paired([0.0] * len(rows), [row[0] for row in rows], [row[-1] for row in rows])

    (first, first_error), (last, last_error) = mean(before), mean(now)
    fall = first - last, math.hypot(first_error, last_error)
    without = paired([row[0] for row in now], [row[1] for row in now], [row[-1] for row in now])
    return list(min(fall, without))

"""The batch of a step, run once more: the loss with the adapter as it is, and with a part of it switched off."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from pedyra.allocate.contract import Closure
from pedyra.allocate.distributed import Average
from pedyra.allocate.mean_loss import ITEMS, is_ignored
from pedyra.fit.calibration import evaluating
from pedyra.fit.samples import num_samples, tensors_of
from pedyra.fit.verdict import paired
from pedyra.lora.layer import AdaptedLayer
from pedyra.methods.pedyra.call import Call


class _Hook:
    """Tells a method of every forward while its object lives, which it does not keep alive; a copy, or a pickle, of the
    model tells nobody."""

    def __init__(self, method: Callable[..., None]) -> None:
        self._method: Callable[[], Any] | None = weakref.WeakMethod(method)

    def __call__(self, *call: Any) -> None:
        method = None if self._method is None else self._method()
        if method is not None:
            method(*call)

    def __getstate__(self) -> dict[str, Any]:
        return {"_method": None}


class Batches:
    """Sees the forward passes of a step, which may be several, and runs them again.

    Args:
        average: over the processes that see parts of the batch.
    """

    def __init__(self, model: nn.Module, average: Average) -> None:
        self._model, self._average = model, average
        self._calls: list[Call] = []
        self.wanted = False
        """Whether the passes of the next step are to be kept."""
        self._handle = model.register_forward_hook(_Hook(self._see), with_kwargs=True)

    def _see(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if not self.wanted or not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return  # an evaluation, or the recomputation of a checkpoint
        loss, samples, items = loss_of(output), num_samples(module, keywords, output), keywords.get(ITEMS)
        share = 1.0 if items is None or is_ignored(items) else samples / items
        kind = samples.device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        call = Call(arguments, keywords, samples, share, autocast, loss is not None)
        call.watch(list(tensors_of(output)), loss, trains=module.training)
        self._calls.append(call)

    @property
    def _trained(self) -> list[Call]:
        return [call for call in self._calls if call.is_trained]

    @property
    def samples(self) -> Tensor:
        """Of the step so far, `()`; 0 where no forward was seen, or no backward pass came to it."""
        trained = self._trained
        return torch.stack([call.samples for call in trained]).sum() if trained else torch.zeros(())

    def loss_scale(self, given: float, closure: Closure | None) -> float | Tensor:
        """What the step's mean loss was multiplied by before the backward pass, `given` by a GradScaler among it.

        As by a loop that adds up its micro-batches and does not divide by their number, or by a model that divides by a
        number it was told. The loss of a `closure` is taken to be what was trained.
        """
        weights = [call.weight() for call in self._trained]
        if closure is not None or not weights or any(weight is None for weight in weights):
            return given
        return torch.stack([weight for weight in weights if weight is not None]).sum()

    def check(self, closure: Closure | None) -> None:
        """Raise ValueError where the loss of this step cannot be had again."""
        trained = self._trained
        if closure is not None and not trained:
            raise ValueError(
                "method pedyra saw no forward pass of the model in this step that was trained on, so it cannot tell "
                "how many samples there were; call the model that RankAllocator was given, not one inside it"
            )
        if closure is None and any(isinstance(each, Cache) for call in trained for each in call.keywords.values()):
            raise ValueError("a cache of keys grows when a batch is run again, as method pedyra does; leave it out")
        if closure is None and trained and all(call.has_loss for call in trained):
            if any(call.weight() is None for call in trained):
                raise ValueError(
                    "method pedyra compares the model's own loss, but another one is trained, made of its other "
                    "outputs (class weights, say); have the model compute it, or pass closure=lambda: loss to "
                    "before_step. In a Trainer: set rank.target_rank, which compares none"
                )
        elif closure is None:
            raise ValueError(
                "method pedyra compares losses with and without what may go, but the model's forward gives none; pass "
                "labels to the model, or closure=lambda: loss to before_step. A Trainer with a loss of its own (DPO, "
                "label_smoothing_factor, compute_loss_func): set rank.target_rank, which compares none"
            )

    def losses(self, closure: Closure | None, *without: Mapping[AdaptedLayer, Tensor]) -> tuple[list[float], float]:
        """The mean loss of this step's batch as the model is, then with each of these projections; and its samples.

        In evaluation mode, without a gradient; no weight and no random number of the run changes. Waits for the device.

        Args:
            without: layer -> what its A is multiplied with, `(r, r)`.
        """
        found, samples = [], self.samples
        devices = (samples.device,) if samples.device.type == "cuda" else ()
        with evaluating(self._model), torch.no_grad():
            for each in ({}, *without):  # a model that draws in evaluation too draws the same for each
                with torch.random.fork_rng(devices), projected(each):
                    found.append(self._loss(closure))
        samples = samples.to(found[0])
        # Processes may have seen other numbers of samples: the mean of all is weighted by them.
        sums = self._average(torch.stack([*(loss * samples for loss in found), samples]))
        *totals, count = sums.tolist()
        return [total / max(count, 1e-3) for total in totals], count

    def _loss(self, closure: Closure | None) -> Tensor:
        if closure is not None:
            return closure().detach().float()
        total: Any = 0.0
        for call in self._trained:
            enabled, dtype = call.autocast
            keywords = {key: value for key, value in call.keywords.items() if key != ITEMS}
            with torch.autocast(call.samples.device.type, dtype=dtype, enabled=enabled):
                found: Any = loss_of(self._model(*call.arguments, **keywords))
                loss = found.float() * call.samples
                total = total + torch.where(call.samples > 0, loss, 0.0)  # the mean over no sample is no number
        return total / self.samples.clamp_min(1e-3)

    def forget(self) -> None:
        """The step is over."""
        for call in self._calls:
            call.end()
        self._calls = []

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()
        self.forget()


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a model gives, where Trainer takes it from: by its name, or the first of a tuple."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if found is None and isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        found = output[0] if output[0].dim() == 0 else None
    return found if isinstance(found, Tensor) else None


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
    rounding = torch.finfo(torch.float32).eps * abs(first)
    fall = first - last, math.hypot(first_error, last_error, rounding)
    without, error = paired([row[0] for row in now], [row[1] for row in now], [row[-1] for row in now])
    return list(min(fall, (without, math.hypot(error, rounding))))

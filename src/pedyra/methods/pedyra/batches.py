"""The batch of a step, run once more: the loss with the adapter as it is, and with a part of it switched off."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from pedyra.allocate.contract import Closure
from pedyra.allocate.distributed import Average
from pedyra.allocate.mean_loss import ITEMS, is_ignored
from pedyra.fitting.calibration import evaluating, projected
from pedyra.fitting.samples import num_samples, tensors_of
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.observation import Watch, weakly

PARALLEL = 0.02
"""Relative distance of two gradients that are taken for the same, but for their length; half precision is no better."""
COMPARED = 512
"""Rows of them that are compared: all logits of a large vocabulary would take memory several times."""


class Call:
    """One forward of `model`: what it was given, and whether its own loss is what is trained."""

    def __init__(self, model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        self.arguments = arguments
        self.keywords = {name: value for name, value in keywords.items() if name != ITEMS}
        self.samples, items = num_samples(model, keywords, output), keywords.get(ITEMS)
        self._share = 1.0 if items is None or is_ignored(items) else self.samples / items
        """Of the samples that its own loss is a mean over: 1, but where it was told to divide by another number."""
        kind = self.samples.device.type
        self._autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        loss, outputs = loss_of(output), list(tensors_of(output))
        self.has_loss, self.is_trained = loss is not None, False
        """Whether a backward pass came to it: to none of an evaluation, nor of a teacher."""
        self._graph = (loss, outputs) if model.training and loss is not None else None
        """Until it is known whether its own loss is what is trained; that of an evaluation is not kept."""
        self._weight: Tensor | None = None
        self._reached: tuple[Tensor, Tensor] | None = None
        """The first output beside the loss that the backward pass came to, and rows of the gradient that it got."""
        for index, each in enumerate(outputs):
            if each.requires_grad:
                each.register_hook(self._loss_reached if each is loss else partial(self._output_reached, index))

    def loss(self, model: nn.Module) -> Tensor:
        """Its mean loss `()` by the model as it is now."""
        kind, dtype, enabled = self._autocast
        with torch.autocast(kind, dtype=dtype, enabled=enabled):
            found: Any = loss_of(model(*self.arguments, **self.keywords))
        return found.float()

    def _loss_reached(self, gradient: Tensor) -> None:
        self.end()
        self.is_trained = True
        self._weight = gradient.detach() + (0.0 if self._weight is None else self._weight)

    def _output_reached(self, index: int, gradient: Tensor) -> None:
        self.is_trained = True
        if self._graph is not None and self._reached is None and gradient.dim() > 0 and gradient.numel() > 0:
            self._reached = self._graph[1][index], _rows(gradient)

    def weight(self) -> Tensor | None:
        """The gradient of what is trained with respect to the call's mean loss; None: it does not come from that.

        Some compute the same loss from another output (TRL's from log-probabilities), and its gradient with respect to
        that is then parallel to the own loss's. Waits for the device in this case alone.
        """
        if self._weight is None and self._graph is not None and self._reached is not None:
            (loss, _), (output, given) = self._graph, self._reached
            self.end()
            try:
                (own,) = torch.autograd.grad(loss, output, allow_unused=True)
            except RuntimeError:  # the graph between them is gone
                own = None
            self._weight = None  # the own loss's hook was called
            if own is not None:
                own = _rows(own)
                weight = (own * given).sum() / own.square().sum()
                if (given - weight * own).norm() <= PARALLEL * given.norm():
                    self._weight = weight.to(loss)
        return None if self._weight is None else self._weight * self._share

    def end(self) -> None:
        """Let go of the graph, whose hooks hold this."""
        self._graph = self._reached = None


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
        self._handle = model.register_forward_hook(Watch(weakly(self._see)), with_kwargs=True)

    def _see(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        is_recomputed = torch._C._current_graph_task_id() != -1  # for a checkpoint, in the backward pass
        if self.wanted and torch.is_grad_enabled() and not is_recomputed:
            self._calls.append(Call(module, arguments, keywords, output))

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
        known = [weight for weight in weights if weight is not None]
        return given if closure is not None or not known or len(known) < len(weights) else torch.stack(known).sum()

    def check(self, closure: Closure | None) -> None:
        """Raise ValueError where the loss of this step cannot be had again."""
        trained = self._trained
        if closure is not None and trained:
            return
        if closure is not None:
            raise ValueError(
                "method pedyra saw no forward pass of the model in this step that was trained on, so it cannot tell "
                "how many samples there were; call the model that RankAllocator was given, not one inside it"
            )
        if any(isinstance(each, Cache) for call in trained for each in call.keywords.values()):
            raise ValueError("a cache of keys grows when a batch is run again, as method pedyra does; leave it out")
        if not trained or not all(call.has_loss for call in trained):
            raise ValueError(
                "method pedyra compares losses with and without what may go, but the model's forward gives none; pass "
                "labels to the model, or closure=lambda: loss to before_step. A Trainer with a loss of its own (DPO, "
                "label_smoothing_factor, compute_loss_func): set rank.target_rank, which compares none"
            )
        if any(call.weight() is None for call in trained):
            raise ValueError(
                "method pedyra compares the model's own loss, but another one is trained, made of its other "
                "outputs (class weights, say); have the model compute it, or pass closure=lambda: loss to "
                "before_step. In a Trainer: set rank.target_rank, which compares none"
            )

    def losses(self, closure: Closure | None, *without: Mapping[AdaptedLayer, Tensor]) -> list[float]:
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
                    found.append(self._loss() if closure is None else closure().detach().float())
        samples = samples.to(found[0])
        # Processes may have seen other numbers of samples: the mean of all is weighted by them.
        *totals, count = self._average(torch.stack([*(loss * samples for loss in found), samples])).tolist()
        return [*(total / max(count, 1e-3) for total in totals), count]

    def _loss(self) -> Tensor:
        total: Any = 0.0
        for call in self._trained:  # the mean over no sample is no number
            total = total + torch.where(call.samples > 0, call.loss(self._model) * call.samples, 0.0)
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


def _rows(gradient: Tensor) -> Tensor:
    """`COMPARED` rows at most, evenly spread: (..., n) -> (rows, n)."""
    rows = gradient.detach().reshape(-1, gradient.shape[-1])
    return rows[:: -(-len(rows) // COMPARED)].double()

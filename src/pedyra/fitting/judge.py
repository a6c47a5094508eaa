"""A judge measures a model on a batch: by the loss that was trained, or by the divergence of its answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from pedyra.errors import UserError
from pedyra.fitting.logits import NUMBERS, Logits, divergences, shifts, writes
from pedyra.fitting.modes import evaluating

Batch = Mapping[str, Any]
Cut = Callable[[], AbstractContextManager[None]]
"""Makes the context in which the live model is the one to be measured: with the whole adapter, a smaller one, none."""
Loss = Callable[[nn.Module, Batch], Tensor]
"""Gives the mean loss of a batch, `()`."""
Answer = Callable[[Batch], Logits | None]
"""Gives the model's answers to a batch."""
Predictions = list[Any]
"""One for each batch, in the form that `Judge.metrics` takes."""


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss that a transformers model gives for a batch with labels."""
    return model(**batch).loss


class Judge:
    """Measures a model by its loss."""

    loss_scale = 1.0
    """The loss that is differentiated is multiplied by this."""
    measure = "loss"
    """The name of the loss in a report."""

    def __init__(self, model: Any, loss: Loss = model_loss) -> None:
        self.model, self._loss = model, loss

    def trained_loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch `()`, to be differentiated; times `loss_scale`."""
        return self._loss(self.model, batch) * self.loss_scale

    def samples(self, batch: Batch) -> float:
        """Count what the loss of a batch is a mean over: tokens or rows with a label, else rows."""
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            first = int(labels.dim() > 1 and shifts(self.model))
            return float((labels[..., first:] != -100).sum())
        rows = (len(each) for each in batch.values() if isinstance(each, Tensor) and each.dim() > 0)
        return float(next(rows, 1))

    def answers(self, batch: Batch) -> Logits | None:
        """Answer a batch with the model as it is; None where its output is no choice among answers."""
        return None

    def answering(self, using: Cut) -> Answer:
        """Return the function that answers a batch with the model that `using` makes."""

        def answer(batch: Batch) -> Logits | None:
            with using(), torch.no_grad():
                return self.answers(batch)

        return answer

    @property
    def writes(self) -> bool:
        """Tell whether the answers are tokens of a text."""
        return writes(self.model)

    def whole(self, batches: Sequence[Batch], cut: Cut, predictions: Predictions | None = None) -> Iterator[float]:
        """Yield the loss of each batch with the whole adapter, the reference."""
        yield from self.losses(batches, cut, predictions)

    def losses(self, batches: Sequence[Batch], cut: Cut, predictions: Predictions | None = None) -> Iterator[float]:
        """Yield the loss of each batch with the model that `cut` makes. Every pass draws the same random numbers.

        Args:
            predictions: gets the prediction of each batch, for `metrics`.
        """
        torch.manual_seed(0)
        with cut(), torch.no_grad():
            for number, batch in enumerate(batches):
                yield finite(float(self._loss(self.model, batch)), number)

    def metrics(self, predictions: Predictions) -> dict[str, float]:
        """Return the task's metrics of all rows that were predicted; none where it has none."""
        return {}

    def correct(self, predictions: Predictions, metrics: Mapping[str, float]) -> list[bool] | None:
        """Tell whether each of these rows is right, by an accuracy that is among their `metrics`; None where there is
        none of single rows."""
        return None


class DivergenceJudge(Judge):
    """Measures how far the model's answers are from those of the whole adapter, where the trained loss is a surrogate
    that says nothing about held-out rows: the mean of KL(whole || cut) over the answers of the batch."""

    measure = "divergence from the whole adapter"

    def __init__(self, model: Any, answer: Answer) -> None:
        super().__init__(model)
        self._answer = answer

    def answers(self, batch: Batch) -> Logits | None:
        return self._answer(batch)

    def _values(self, batch: Batch) -> Tensor:
        logits = self._answer(batch)
        if logits is None:
            raise UserError(NUMBERS)
        return logits.values

    def trained_loss(self, batch: Batch) -> Tensor:
        """Return minus the log-likelihood of what the whole adapter itself would say, drawn at random: the second
        moment of its gradients is the Fisher information, which is the curvature of the divergence, and their mean is
        zero. The draw is seeded by the batch, so that any number of processes draw the same."""
        logits = self._values(batch).float()
        seed = sum(int(value.double().abs().sum()) for value in batch.values() if isinstance(value, Tensor))
        generator = torch.Generator(logits.device).manual_seed(seed)
        draws = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(-1)
        return nn.functional.cross_entropy(logits, draws) * self.loss_scale

    def whole(self, batches: Sequence[Batch], cut: Cut, predictions: Predictions | None = None) -> Iterator[float]:
        yield from (0.0 for _ in batches)

    def losses(self, batches: Sequence[Batch], cut: Cut, predictions: Predictions | None = None) -> Iterator[float]:
        for number, batch in enumerate(batches):
            with torch.no_grad():
                with evaluating(self.model):
                    teacher = self._values(batch)
                with cut():
                    yield finite(float(divergences(self._values(batch), teacher).mean()), number)


def finite(loss: float, number: int) -> float:
    """Return the loss of the batch of this number. Raises ValueError where it is no number."""
    if not math.isfinite(loss):
        raise UserError(f"the loss of held-out batch {number} is {loss}; take its rows out")
    return loss

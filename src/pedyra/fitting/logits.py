"""A model answers a batch by logits, one set an answer: a class of a row, or the next token at each place of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pedyra.fitting.paired import Increase, paired
from pedyra.fitting.share import Share

CHUNK = 256
"""Answers whose divergence is computed at once: with a vocabulary of 150,000 they are 0.15 GB in float32."""
NUMBERS = (
    "an answer is a class of a row or the next token of a text, and this model gives numbers (a regression, a reward) "
    "or no logits, of which no share changes; ask for a part of the gain (1%)"
)


class Logits(NamedTuple):
    """The answers of a model to a batch."""

    values: Float[Tensor, "answers choices"]
    rows: Int[Tensor, " answers"]
    """The row of the batch to which each answer belongs."""


class RowAnswers(NamedTuple):
    """The answers of two models to a row."""

    answers: int
    changed: int
    """How many of them differ."""
    divergence: float
    """The sum of KL(whole || smaller) over the answers; 0 where it was not measured."""


def shifts(model: Any) -> bool:
    """Tell whether labels are the tokens themselves, each predicted from those before it, so that none predicts the
    first: in language models, but for those whose decoder is given the labels one place later."""
    return writes(model) and not getattr(model.config, "is_encoder_decoder", False)


def writes(model: Any) -> bool:
    """Tell whether it is a language model, whose answers are tokens."""
    return hasattr(model, "can_generate") and bool(model.can_generate())


def answer_logits(model: Any, batch: Mapping[str, Any], logits: Any) -> Logits | None:
    """Pick the logits of the answers from a model's output: of rows `(rows, classes)`, or of the tokens that have a
    label, from `(rows, tokens, classes)`. None where the model has no such answers: a number a row, several classes at
    once, the span of a text."""
    labels = batch.get("labels")
    if not isinstance(logits, Tensor) or (isinstance(labels, Tensor) and labels.is_floating_point()):
        return None
    if logits.dim() == 2 and logits.shape[1] > 1:
        return Logits(logits, torch.arange(len(logits), device=logits.device))
    if logits.dim() != 3 or not isinstance(labels, Tensor) or labels.dim() != 2:
        return None
    rows, places = (labels.to(logits.device)[:, int(shifts(model)) :] != -100).nonzero(as_tuple=True)
    return Logits(logits[rows, places], rows)


def divergences(
    student: Float[Tensor, "answers choices"], teacher: Float[Tensor, "answers choices"]
) -> Float[Tensor, " answers"]:
    """Return KL(teacher || student) of each answer, of the softmax of both."""
    parts = []
    for q, p in zip(student.split(CHUNK), teacher.split(CHUNK), strict=True):
        q, p = q.float().log_softmax(-1), p.float().log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(parts)


def by_row(
    rows: Int[Tensor, " answers"], changed: Bool[Tensor, " answers"], divergence: Float[Tensor, " answers"] | None
) -> list[RowAnswers]:
    """Sum over the answers of each row; a row without any is left out."""
    count = torch.bincount(rows)
    sums = [torch.zeros(len(count), device=rows.device).double() for _ in range(2)]
    for total, values in zip(sums, (changed, divergence), strict=True):
        if values is not None:
            total.index_add_(0, rows, values.double())
    table = zip(count.tolist(), *(total.tolist() for total in sums), strict=True)
    return [RowAnswers(answers, round(differ), total) for answers, differ, total in table if answers]


def row_answers(whole: Logits, smaller: Logits) -> list[RowAnswers]:
    """Compare two models' answers to the same batch."""
    changed = smaller.values.argmax(-1) != whole.values.argmax(-1)
    return by_row(whole.rows, changed, divergences(smaller.values, whole.values))


def share_of(rows: Sequence[RowAnswers]) -> Share:
    """Return the share of the answers that change, a mean over rows."""
    return Share.of([row.changed / row.answers for row in rows])


def per_token(rows: Sequence[RowAnswers]) -> tuple[Increase, Increase]:
    """Return the mean divergence a token and the share of the same top token, both means over tokens, as llama.cpp
    counts them, with rows as the unit of their errors."""
    none, weights = [0.0] * len(rows), [float(row.answers) for row in rows]
    return (
        paired(none, [row.divergence / row.answers for row in rows], weights),
        paired(none, [1 - row.changed / row.answers for row in rows], weights),
    )

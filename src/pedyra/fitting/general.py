"""General text is what a fine-tuned model should not forget; some directions of its adapter make it forget most.

An adapter lowers the loss of its task, and often raises that of other text. Half of the adapter lies in the middle of
the straight path from the base model to the whole one. There the slope of a loss along each direction's gate tells what
part of the loss's change over the path is that direction's (integrated gradients by the midpoint rule; Sundararajan,
Taly, Yan 2017, "Axiomatic attribution for deep networks"). A direction that harms general text much for what it does
for the task goes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor

from pedyra.errors import UserError
from pedyra.fitting.balance import in_basis
from pedyra.fitting.calibration import Calibration, lora_layers, measured
from pedyra.fitting.judge import Batch, Judge, shifts
from pedyra.fitting.paired import Increase
from pedyra.fitting.sizes import Candidate, size, whole
from pedyra.fitting.verdict import FORGETS_LESS, UNKNOWN

TOKENS = 128
"""A general text is read up to here: every result of research/results.md was measured with this number."""
Slopes = dict[str, Float[Tensor, " r"]]
"""Layer -> dL/dz_i of each of its directions, in the order of a calibration."""
Going = list[tuple[str, float]]
"""Directions stand in the order in which they go, each as its layer and what it harms."""


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """What an adapter does to general text is measured on rows that had no part in the choice."""

    whole: Increase
    """The loss rises by this from the base model to the whole adapter."""
    smaller: Increase
    """The loss rises by this from the base model to the size that was taken."""
    undone: Increase
    """The loss rises by this from the whole adapter to that size: negative where it forgets less."""

    def verdict(self, cut: bool) -> tuple[str, str]:
        """Say whether the smaller adapter forgets less, clear of noise, and the same in words.

        Args:
            cut: whether there is a smaller one.
        """
        low, high = self.undone.interval()
        told = f"{self.undone.mean:+.4f} [{low:+.4f}, {high:+.4f}] (95 %)"
        if self.whole.lower() <= 0:
            return UNKNOWN, (
                f"unknown: the adapter has not raised the loss of general text beyond its noise "
                f"({self.whole.mean:+.4f} ± {self.whole.error:.4f}), so there is nothing to undo"
            )
        if not cut:
            return UNKNOWN, (
                "unknown: no smaller size is proved to be within the tolerance, so nothing of what was forgotten is "
                "undone; give more rows, or a larger tolerance"
            )
        if high >= 0:
            return UNKNOWN, f"unknown: these rows do not tell whether less is forgotten ({told}); give more of them"
        left = max(0.0, self.smaller.mean / self.whole.mean)
        return FORGETS_LESS, f"forgets less: {left:.0%} of what the adapter costs general text is left"


@contextmanager
def scaled(model: Any, part: float, adapter: str = "default") -> Iterator[None]:
    """While it lasts, each layer adds this part of what the adapter gives."""
    layers = lora_layers(model, adapter).values()
    before = [layer.scaling[adapter] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[adapter] *= part
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[adapter] = scaling


def slopes_at_half(
    judge: Judge, batches: Iterable[Batch], calibration: Calibration, *, adapter: str = "default"
) -> Slopes:
    """Find the slope of the mean loss of these batches along the gate of each direction, where every gate is at a half.

    A forward and a backward pass per batch, in evaluation mode; nothing of the model changes. The processes of
    accelerate have other batches, as many each; all of them are given the same.

    Half of a DoRA, or of an adapter with a bias, is half of its product B A alone. The order is then a rougher one, and
    what is measured of it is as right as ever.

    Raises:
        ValueError: no batch has a finite loss.
    """
    with scaled(judge.model, 0.5, adapter):
        sums, samples = measured(judge, batches, adapter).joined(gather_object)
    if not len(samples):
        raise UserError("no batch has a finite loss, so no slope is known; give other rows, or train in bfloat16")
    found = {}
    for name, layer in calibration.layers.items():
        slopes = in_basis(sums[name].K, layer.basis).diagonal(dim1=1, dim2=2)
        found[name] = 2 * (samples[:, None] * slopes).sum(0) / samples.sum()  # what was seen is z dL/dz, at z = 1/2
    return found


def harm_first(calibration: Calibration, task: Slopes, general: Slopes) -> tuple[Calibration, Going]:
    """Order the directions by when they go: first those whose part in the fall of the task's loss is the least for
    their part in the rise of the general one. Those that do no harm follow, by their worth to the task for each
    parameter. In the calibration those of a layer that go first stand last.
    """
    entries = []
    for name, layer in calibration.layers.items():
        for index, (gain, harm) in enumerate(zip((-task[name]).tolist(), general[name].tolist(), strict=True)):
            ratio = gain / harm if harm > 0 else gain / layer.parameters
            entries.append(((harm <= 0, ratio), name, index, harm))
    kept: dict[str, list[int]] = {name: [] for name in calibration.layers}
    for _, name, index, _ in sorted(entries, reverse=True):
        kept[name].append(index)
    layers = {name: layer.reordered(kept[name]) for name, layer in calibration.layers.items()}
    return replace(calibration, layers=layers), [(name, harm) for _, name, _, harm in sorted(entries)]


LEFT = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 3 / 32, 1 / 16, 1 / 32)
"""The sizes leave these parts of the harm. Most of it is done by few of the parameters, so a size goes by it."""


def by_harm(calibration: Calibration, going: Going) -> list[Candidate]:
    """Make the sizes in the order of `harm_first`: the largest that leaves at most each of these parts of the harm."""
    ranks, sizes = whole(calibration), []
    left = total = sum(max(0.0, harm) for _, harm in going)
    wanted = [part * total for part in LEFT]
    for name, harm in going[:-1]:  # one direction stays
        ranks[name] -= 1
        left -= max(0.0, harm)
        if wanted and left <= wanted[0]:
            sizes.append(size(calibration, dict(ranks)))
            wanted = [each for each in wanted if each < left]
    return sizes


def check_writes(model: Any) -> None:
    """Raise ValueError for a model that is no causal language model: no loss tells what it makes of general text."""
    if not shifts(model):
        kind = type(model.get_base_model()).__name__
        raise UserError(f"general text is for a model that writes, and this is {kind}; leave general out")


def text_batches(tokenizer: Any, texts: Sequence[str], size: int) -> list[Batch]:
    """Make the batches on which a language model is judged of texts, at most `TOKENS` of each, in batches of `size`
    rows. Raises ValueError: a text has fewer than two tokens."""
    rows = [tokenizer(text, truncation=True, max_length=TOKENS)["input_ids"] for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) < 2:
            raise UserError(f"the general text {text!r} has fewer than two tokens, so none is predicted; leave it out")
    pad = tokenizer.pad_token_id or 0
    batches = []
    for start in range(0, len(rows), size):
        ids = [torch.tensor(row) for row in rows[start : start + size]]
        padded, labels = (
            torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=value) for value in (pad, -100)
        )
        batches.append({"input_ids": padded, "attention_mask": (labels != -100).long(), "labels": labels})
    return batches


def texts_of(rows: Any) -> list[str]:
    """Take the texts of a list of them, or of rows with the column `text`. Raises ValueError: a row has none, or it is
    one text alone."""
    if isinstance(rows, str):
        raise UserError(f"general is one text, {rows:.40}...; give a list of texts, or rows with a column text")
    texts: list[str] = []
    for number, row in enumerate(rows, 1):
        text = row.get("text") if isinstance(row, Mapping) else row
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"general row {number} has no text: {text!r}; give texts, or rows with a column text")
        texts.append(text)
    return texts

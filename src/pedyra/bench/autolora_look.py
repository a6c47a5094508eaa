"""AutoLoRA as a contender of the small benchmarks: a search that weighs ranks, then LoRA from scratch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pedyra.bench.looks import Look, Setup
from pedyra.bench.loop import make_student
from pedyra.lora.attach import AdaptedLayer
from pedyra.methods.autolora import PASSES_PER_STEP, AutoLoraSettings, search


@dataclass(frozen=True, kw_only=True)
class AutoLoraLook(Look):
    """`gains` are the weights of a layer's ranks, which add up to 1."""

    rank: int
    """Of the budget."""

    def start(self, adapted: Sequence[AdaptedLayer]) -> None:
        """LoRA's own start at the ranks found, scaled by alpha / rank."""
        for layer in adapted:
            layer.rescale(self.rank / layer.rank)


def autolora_look(setup: Setup) -> AutoLoraLook:
    """Weigh twice the budget's ranks in a search that takes as many passes as the run, beside it.

    A and B are searched at the run's learning rate and scaling, since the authors' suit language models; every other
    batch is the validation's. A search that diverges leaves the ranks equal.
    """
    ranks = {name: min(2 * setup.rank, *setup.base.get_submodule(name).weight.shape) for name in setup.layers}  # type: ignore[misc, union-attr]
    batches = iter(setup.draw, None)
    found = search(
        make_student(setup.base, ranks, setup.scaling, setup.seed),
        batches,
        batches,
        steps=max(1, len(setup.factors) // PASSES_PER_STEP),
        lower_learning_rate=setup.lr,
        upper_learning_rate=AutoLoraSettings().upper_learning_rate,
    )
    gains = {name: sorted(weights, reverse=True) for name, weights in found.weights.items()}
    if not all(math.isfinite(weight) for weights in gains.values() for weight in weights):
        gains = {name: [-float(index) for index in range(rank)] for name, rank in ranks.items()}
    return AutoLoraLook(steps=0, gains=gains, rank=setup.rank)

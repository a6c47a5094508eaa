"""Graded ranks, the idea of MatryoshkaLoRA (Modoranu et al. 2026): the first ranks of every layer do alone."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pedyra.methods.method import Adaptation, Method, Request
from pedyra.methods.own_factors import Factors, Slot, fill, linear, linear_slots, write_plain


class GradedA(Slot):
    """The `lora_A` slot: x (..., in) -> E A x (..., r), with A `(r, in)` trained and E `(r,)` not."""

    E: Tensor

    def __init__(self, A: nn.Parameter) -> None:
        super().__init__()
        self.A = A
        self.register_buffer("E", grades(len(A)).to(A), persistent=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.E[:, None] * self.A


def grades(rank: int) -> Float[Tensor, " r"]:
    """In how many of the first 1, 2, 4, 8, ..., r ranks each rank is, squared: 16, 9, 4, 4, 1, 1, 1, 1 for r = 8."""
    nested = [*(2**power for power in range(rank.bit_length()) if 2**power < rank), rank]
    return torch.tensor([sum(place < each for each in nested) ** 2 for place in range(rank)], dtype=torch.float32)


def prepare(request: Request) -> Adaptation:
    """LoRA with a fixed E that falls from rank to rank, so the first ranks learn first and hold most of the update.

    Departs from the authors: their factor of a rank is in how many of the nested ranks it is (or the sum of 1 / r or of
    1 / sqrt r over these), and here it is the square of that, 16 to 1 for r = 8 and not 4 to 1. They take it away after
    training; here it is folded into A, so that what is saved is what was trained. `pedyra bench cuts` keeps the first
    ranks of each layer. Raises ValueError: DoRA or another start.
    """
    request.refuse_lora("graded ranks scale LoRA's own start", "init", "use_dora")
    model = request.with_lora()
    layers = linear_slots(model)
    for layer in layers:
        fill(layer, GradedA(layer.a.A), linear(layer.b.weight))

    def finish() -> None:
        write_plain(model, {layer: Factors(layer.a.weight, layer.b.weight, layer.scaling) for layer in layers})

    return Adaptation(model=model, finish=finish)


METHOD = Method("graded", "LoRA whose first ranks do alone (after Modoranu et al. 2026)", prepare)

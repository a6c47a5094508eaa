"""Singular directions of a layer's product: what its triples would be once turned, and turning them in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from pedyra.allocate.batching import alike, in_pieces
from pedyra.allocate.optimizer_state import LARGEST, SECOND_MOMENTS, forget_overflow
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.resize import turn
from pedyra.methods.pedyra.directions import singular_turn, triple_lengths


@dataclass(frozen=True)
class Turn:
    """How a layer's triples would be turned, and how long they then are."""

    W: Tensor | None
    """(r, r): new rows of A are W times the old ones, new columns of B the old ones times W^-1. None: leave them."""
    lengths: list[float]
    """As `lengths` has them."""


@torch.no_grad()
def turns_of(layers: Sequence[AdaptedLayer], rows: Mapping[str, int]) -> dict[str, Turn]:
    """Layer -> the turn of its first `rows[name]` triples; E is 1. The others, which are new, stay as they are.

    Its W is None where rows of A depend on each other.
    """
    old = [rows[layer.name] for layer in layers]
    order: list[int] = []
    turned: list[Tensor] = []
    tables: list[Tensor] = []
    for group in alike((*layer.shape, n) for layer, n in zip(layers, old, strict=True)):
        A = torch.stack([layers[i].a.A.float() for i in group])
        B = torch.stack([layers[i].b.weight.float() for i in group])
        W, usable, lengths = _turned(A, B, old[group[0]])
        scaling = A.new_tensor([[layers[i].scaling] for i in group])
        table = torch.stack([usable[:, None].expand_as(lengths), scaling * lengths], -1)
        order += group
        turned += W
        tables.append(table.flatten(0, 1))
    numbers = iter(torch.cat(tables).tolist())  # the host waits once for all layers
    turns = {}
    for index, W in zip(order, turned, strict=True):
        table = [next(numbers) for _ in range(layers[index].rank)]
        use = any(usable for usable, _ in table)
        turns[index] = Turn(W if use else None, [row[1] for row in table])
    return {layer.name: turns[index] for index, layer in enumerate(layers)}


def _turned(A: Tensor, B: Tensor, n: int) -> tuple[Tensor, ...]:
    """W of layers of one shape, whether it is usable, and the lengths of all triples once turned."""
    first = A.new_full((len(A), n, n), torch.nan)
    if 0 < n <= min(A.shape[2], B.shape[1]):
        first = singular_turn(A[:, :n], B[..., :n])
    usable = (first.isfinite() & torch.linalg.inv_ex(first).inverse.isfinite()).all(-1).all(-1)
    W = torch.eye(A.shape[1], device=A.device).repeat(len(A), 1, 1)
    W[:, :n, :n] = torch.where(usable[:, None, None], first, W[:, :n, :n])
    A, B = W @ A, B @ torch.linalg.inv_ex(W).inverse
    ones = torch.ones_like(A[..., 0])
    return W, usable, triple_lengths(A, ones, B)


@torch.no_grad()
def turn_layer(layer: AdaptedLayer, optimizer: Optimizer, W: Tensor | None) -> None:
    """Turn the layer's triples by W `(r, r)`, and their moments; nothing where it is None.

    A gradient of B turns with A, one of A against B, and so do their moving averages. Second moments turn as if the
    gradients of a layer's triples were uncorrelated, and largest sizes (Adamax) become the largest that they can be.
    """
    if W is None:
        return
    inverse = torch.linalg.inv_ex(W).inverse
    turn(layer, W, inverse)
    A, B = layer.a.A, layer.b.weight
    for parameter, rows, mix in ((A, True, inverse.T), (B, False, W.T)):
        forget_overflow(optimizer, parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                continue
            by = mix.square() if key in SECOND_MOMENTS else mix.abs() if key in LARGEST else mix
            largest = torch.finfo(value.dtype).max
            turned = by @ value.to(W.dtype) if rows else value.to(W.dtype) @ by
            value.copy_(turned.nan_to_num_(0.0, largest, -largest))  # the largest numbers, mixed, may overflow


def shared(total: float, lengths: Sequence[float]) -> list[float]:
    """What all triples of a layer are worth, by the squares of the lengths that they have once turned."""
    squares = [length**2 for length in lengths]
    whole = sum(squares)
    return [total * square / whole if whole else total / len(squares) for square in squares]


def leaving_out(W: Tensor, indices: Tensor) -> Tensor:
    """`AFactor.kept_directions` `(r, r)` without these triples of those that W makes."""
    on = torch.ones(len(W), device=W.device)
    on[indices] = 0
    return torch.linalg.inv_ex(W).inverse @ (on[:, None] * W)


def directions_of(layer: AdaptedLayer, indices: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """(u `(out, n)`, v `(n, in)`) of these triples that W makes, such that adding along -u v^T is putting them back."""
    A = (W @ layer.a.A.detach().float())[indices]
    B = ((layer.b.weight * layer.a.E).detach().float() @ torch.linalg.inv_ex(W).inverse)[:, indices]
    return -torch.nn.functional.normalize(B, dim=0), torch.nn.functional.normalize(A, dim=1)


@torch.no_grad()
def lengths(layers: Sequence[AdaptedLayer], turned: Sequence[Tensor] | None = None) -> list[Tensor]:
    """||s b e a|| of each triple of every layer with its scaling s, `(r,)`, float32; or of those `turned` makes."""
    result = [torch.empty(0)] * len(layers)
    for group in alike(layer.shape for layer in layers):
        factors = [layers[i].factors for i in group]
        A, _, B = factors[0]
        for piece in in_pieces(range(len(group)), A.numel() + B.numel(), A.device):
            members = [group[i] for i in piece]
            A, E, B = (
                torch.stack([factor.detach().float() for factor in each])
                for each in zip(*(factors[i] for i in piece), strict=True)
            )
            if turned is not None:
                W = torch.stack([turned[i] for i in members])
                A, B = W @ A, B @ torch.linalg.inv_ex(W).inverse
            scaling = A.new_tensor([[layers[i].scaling] for i in members])
            for index, each in zip(members, scaling * triple_lengths(A, E, B), strict=True):
                result[index] = each
    return result

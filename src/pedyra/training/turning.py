"""Turn a layer's triples into the singular directions of their product, in place, with the optimizer's moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from pedyra.adapters.attach import AdaptedLayer
from pedyra.core.directions import singular_turn
from pedyra.core.importance import input_scores, triple_lengths
from pedyra.training.optimizer_state import SECOND_MOMENTS
from pedyra.training.scores import ScoreState, TripleScores


@dataclass(frozen=True)
class Turn:
    """How a layer's first triples would be turned, and how long they then are, and score by Eq. (6)."""

    W: Tensor | None
    """(n, n): new rows of A are W times the old ones, new columns of B the old ones times W^-1. None: leave them."""
    lengths: list[float]
    """As `gradient_sketch.lengths`, of all triples of the layer; those beyond the first n as they are."""
    scores: list[float]


@torch.no_grad()
def turns_of(layers: Sequence[AdaptedLayer], rows: Mapping[str, int], observed: ScoreState) -> dict[str, Turn]:
    """Layer -> the turn of its first `rows[name]` triples; E is 1. None where rows of A depend on each other."""
    energies = observed.energies if isinstance(observed, TripleScores) else [None] * len(layers)
    turned, lengths, scores = [], [], []
    for layer, energy in zip(layers, energies, strict=True):
        n = rows[layer.name]
        A, B = layer.a.A.float(), layer.b.weight.float()
        W = singular_turn(A[:n], B[:, :n]) if 0 < n <= min(A.shape[1], B.shape[0]) else A.new_full((n, n), torch.nan)
        # Decided on the device: the host waits once for all layers.
        usable = W.isfinite().all()
        change = torch.where(usable, W, torch.eye(n, device=W.device))
        A = torch.cat([change @ A[:n], A[n:]])
        B = torch.cat([B[:, :n] @ torch.linalg.inv(change), B[:, n:]], 1)
        seen = torch.ones_like(A.sum(0)) if energy is None else torch.where(energy.any(), energy, 1.0)
        turned.append((W, usable))
        ones = torch.ones_like(A.sum(1))
        lengths.append(layer.scaling * triple_lengths(A, ones, B))
        scores.append(input_scores(A, ones, B, seen))
    usable = torch.stack([usable for _, usable in turned]).tolist()
    values = iter(torch.stack([torch.cat(lengths), torch.cat(scores)], 1).tolist())
    turns = {}
    for layer, (W, _), use in zip(layers, turned, usable, strict=True):
        table = [next(values) for _ in range(layer.rank)]
        turns[layer.name] = Turn(W if use else None, [length for length, _ in table], [score for _, score in table])
    return turns


@torch.no_grad()
def turn_layer(layer: AdaptedLayer, optimizer: Optimizer, turn: Turn) -> None:
    """Turn the layer's first triples and their moments.

    A gradient of B turns with A, one of A against B, and so do their moving averages. Second moments turn as if the
    gradients of a layer's triples were uncorrelated.
    """
    if turn.W is None:
        return
    W, n = turn.W, len(turn.W)
    inverse = torch.linalg.inv(W)
    A, B = layer.a.A, layer.b.weight
    A[:n] = (W @ A[:n].float()).to(A)
    B[:, :n] = (B[:, :n].float() @ inverse).to(B)
    for parameter, rows, mix in ((A, True, inverse.T), (B, False, W.T)):
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                continue
            by = mix.square() if key in SECOND_MOMENTS else mix
            part = value[:n] if rows else value[:, :n]
            part.copy_(by @ part.float() if rows else part.float() @ by)

"""Which triples are tried before an adjustment, and what earlier trials tell of all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from pedyra.lora.layer import AdaptedLayer
from pedyra.methods.pedyra.swaps import Curvature, choose_trials
from pedyra.methods.pedyra.turning import lengths, turns_of


def known_lengths(layers: Sequence[AdaptedLayer], turned: Sequence[Tensor] | None = None) -> dict[str, list[float]]:
    """Layer -> the length of each of its triples, or of those that `turned` makes. One transfer to the host."""
    found = lengths(layers, turned)
    every = iter(torch.cat(found).tolist())
    return {layer.name: list(islice(every, len(each))) for layer, each in zip(layers, found, strict=True)}


def predicted_losses(
    lengths: Mapping[str, Sequence[float]], curvature: Mapping[str, Curvature]
) -> dict[str, list[float]]:
    """Layer -> h c^2 / 2 of each triple of length c: what pruning it costs to second order."""
    return {name: curvature[name].losses(each) for name, each in lengths.items()}


def choose(
    layers: Sequence[AdaptedLayer],
    *,
    curvature: Mapping[str, Curvature],
    born: Mapping[str, int],
    unknown: Collection[str],
    moves: int,
    min_rank: int,
    prices: Mapping[str, int],
) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
    """The triples that are tried before the next adjustment, and how their layers are turned; all stay as they are.

    They are the lowest of what all would be once turned, and of every layer in `unknown`, in which none was ever tried,
    the lowest as well.

    Args:
        born: layer -> how many of its last rows came with the last adjustment.
        unknown: layers that may grow, whose curvature their trial tells. Their triples are worth most, so by their
            scores they would be the last to be tried.
        prices: units of the budget of one triple of each layer.
    """
    ranks = {layer.name: layer.rank for layer in layers}
    old = {name: rank - born.get(name, 0) for name, rank in ranks.items()}
    fixed = all(layer.a.e_fixed_at_one for layer in layers)  # not where an earlier training left E
    turns = turns_of(layers, old) if fixed else {}
    sizes = {name: turn.lengths for name, turn in turns.items()} if turns else known_lengths(layers)
    scores = predicted_losses(sizes, curvature)
    chosen = choose_trials(
        scores,
        moves=moves,
        min_rank=min_rank,
        costs=prices,
        newborn={name: range(old[name], ranks[name]) for name in ranks},
    )
    for name, values in scores.items():
        if name in unknown and old[name] > min_rank and name not in chosen:
            chosen[name] = (min(range(old[name]), key=values.__getitem__),)
    found = ((name, turns[name].W) for name in chosen if name in turns)
    return chosen, {name: W for name, W in found if W is not None}

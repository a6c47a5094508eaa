"""Which triples are tried before an adjustment, and what earlier trials tell of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pedyra.allocate.allocation import Scores
from pedyra.config import RankConfig
from pedyra.lora.attach import AdaptedLayer
from pedyra.methods.pedyra.swaps import Curvature, Gain, Trials, choose_trials, curvatures
from pedyra.methods.pedyra.turning import lengths, turns_of

History = Sequence[Mapping[str, Any]]
"""The records of the adjustments so far, oldest first."""


def known_curvature(
    layers: Sequence[AdaptedLayer], history: History, now: Trials | None = None
) -> dict[str, Curvature]:
    """The curvature of every layer by all trials that are on record, and those of `now`."""
    looks: list[Trials] = []
    for record in history:
        look: dict[str, dict[int, Gain]] = {}
        for name, triple, *measured in record.get("trials", ()):
            look.setdefault(name, {})[triple] = Gain(*measured)
        looks.append(look)
    return curvatures([layer.name for layer in layers], looks if now is None else [*looks, now])


def known_lengths(layers: Sequence[AdaptedLayer]) -> dict[str, list[float]]:
    """Layer -> the length of each of its triples. One transfer to the host."""
    found = lengths(layers)
    every = iter(torch.cat(found).tolist())
    return {layer.name: list(islice(every, len(each))) for layer, each in zip(layers, found, strict=True)}


def predicted_losses(
    lengths: Mapping[str, Sequence[float]], curvature: Mapping[str, Curvature]
) -> dict[str, list[float]]:
    """Layer -> h c^2 / 2 of each triple of length c: what pruning it costs to second order."""
    return {name: curvature[name].losses(each) for name, each in lengths.items()}


def how_many(history: History, moves: int) -> int:
    """Of the k = `moves` triples that would be tried next: no more than the last look had sure directions to replace.

    Trying a triple is not free: the others do its work meanwhile, and it comes back among them.
    """
    return min(moves, history[-1]["sure"]) if history else 0


def choose(
    layers: Sequence[AdaptedLayer],
    config: RankConfig,
    as_they_are: Callable[[], Scores],
    *,
    history: History,
    moves: int,
) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
    """The triples that are tried before the next adjustment, the lowest and `scouts`, and how their layers are turned.

    The scores `as_they_are` order them where nothing is turned; else what they would be once turned, Adam's second
    moments being known of all of a layer's triples together. The layers stay as they are.
    """
    last, ranks = history[-1], {layer.name: layer.rank for layer in layers}
    # Newborn triples are the last rows of their layers, where no other ranks were loaded since.
    born = {name: count for name, count in last["added"].items() if ranks[name] == last["ranks"][name]}
    old = {name: rank - born.get(name, 0) for name, rank in ranks.items()}
    unit = all(layer.a.unit for layer in layers)  # not where an earlier training left E
    turns = turns_of(layers, old) if unit else {}
    if not turns:
        scores = as_they_are()
    else:
        curvature = known_curvature(layers, history)
        scores = predicted_losses({name: turn.lengths for name, turn in turns.items()}, curvature)
    chosen = choose_trials(
        scores,
        moves=moves,
        min_rank=config.min_rank,
        costs={layer.name: 1 if config.budget == "ranks" else layer.cost for layer in layers},
        newborn={name: range(old[name], ranks[name]) for name in ranks},
    )
    unknown = scouts(scores, min_rank=config.min_rank, old=old, history=history)
    chosen |= {name: triples for name, triples in unknown.items() if name not in chosen}
    found = ((name, turns[name].W) for name in chosen if name in turns)
    return chosen, {name: W for name, W in found if W is not None}


def scouts(scores: Scores, *, min_rank: int, old: Mapping[str, int], history: History) -> dict[str, tuple[int, ...]]:
    """The lowest of the `old` first triples of every layer that may grow and in which none was ever tried.

    Its trial tells the layer's curvature. Layers that grow are those whose triples are worth most, so by their scores
    they would be the last to be tried.
    """
    tried = {name for record in history for name, *_ in record.get("trials", ())}
    last = history[-1]
    chance = math.inf if last["chance"] is None else last["chance"]
    promise = {name for name, measured in last["gains"].items() if Gain(*measured).beyond(chance)}
    return {
        name: (min(range(old[name]), key=values.__getitem__),)
        for name, values in scores.items()
        if name in promise - tried and old[name] > min_rank
    }

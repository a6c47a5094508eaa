"""What an allocator shows of itself: the set-up of a run, and snapshots of its state. Plain values, for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pedyra.allocate.orthogonality_gradient import layer_orthogonality
from pedyra.allocate.scores import TripleScores
from pedyra.lora.attach import AdaptedLayer
from pedyra.lora.layer_names import layer_place
from pedyra.lora.spectrum import effective_rank, singular_values
from pedyra.methods.pareto import two_thirds_log_variance
from pedyra.methods.pedyra.sketching import too_short_to_try

if TYPE_CHECKING:
    from pedyra.allocate.rank_allocator import RankAllocator


def describe(allocator: RankAllocator) -> dict[str, Any]:
    """The run as it was set up: layers, budget, schedule, scaling, config; plain values for JSON."""
    return {
        "kind": "layers",
        "layers": [
            {
                "name": layer.name,
                "type": layer_place(layer.name)[0],
                "depth": layer_place(layer.name)[1],
                "in_features": layer.a.in_features,
                "out_features": layer.b.out_features,
                "rank": layer.rank,
            }
            for layer in allocator.layers
        ],
        "budget": {
            "kind": allocator.config.budget,
            "total_rank": sum(allocator.ranks.values()),
            "parameters": allocator.initial_parameters,
        },
        "schedule": {
            "total_steps": allocator.schedule.total_steps,
            "initial_warmup": allocator.schedule.initial_warmup,
            "interval": allocator.schedule.interval,
            "final_warmup": allocator.schedule.final_warmup,
            "moves": allocator.moves,
            "adjustments": list(allocator.schedule.adjustments),
            "deal": allocator.deal_step,
            "in_vain": too_short_to_try(allocator.settings, allocator.config, allocator.schedule),
        },
        "scaling": {layer.name: layer.scaling for layer in allocator.layers},
        "fused_layers": allocator.fused_layers,
        "config": allocator.config.to_dict(),
    }


@torch.no_grad()
def snapshot(allocator: RankAllocator, effective_ranks: bool = True) -> dict[str, Any]:
    """Diagnostics of the current state (Figs. 1a, 5, 10, 11). Not for the step path: it waits for the device.

    `grad_norms`, and `layer_scores` that come from observed steps, are None where the current one is not tracked.
    """
    tracked = allocator.step > 0 and allocator.tracks(allocator.step)
    scores = allocator.triple_scores() if tracked or (allocator.step > 0 and not allocator.scores_observe) else None
    layer_scores = None if scores is None else {n: sum(s) / len(s) if s else 0.0 for n, s in scores.items()}
    own = allocator.rule.scores is None
    norms = allocator.scores.norms.tolist() if tracked and isinstance(allocator.scores, TripleScores) else None
    return {
        "kind": "snapshot",
        "step": allocator.step,
        "ranks": allocator.ranks,
        "total_rank": sum(allocator.ranks.values()),
        "parameters": allocator.parameters,
        "effective_rank": _effective_ranks(allocator.layers) if effective_ranks else None,
        "orthogonality": layer_orthogonality(allocator.layers, form=allocator.config.orth_form),
        "grad_norms": norms and {layer.name: norm for layer, norm in zip(allocator.layers, norms, strict=True)},
        "layer_scores": layer_scores,
        # Of other methods' scores, which may be negative, Eq. (8) says nothing.
        "two_thirds_log_variance": layer_scores and own and two_thirds_log_variance(layer_scores, allocator.ranks),
    }


def _effective_ranks(layers: Sequence[AdaptedLayer]) -> dict[str, float]:
    factors = ((layer.name, layer.a.weight, layer.b.weight) for layer in layers)
    return {name: effective_rank(singular_values(A, B.new_ones(len(A)), B)) for name, A, B in factors}

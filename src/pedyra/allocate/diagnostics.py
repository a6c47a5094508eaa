"""What a run shows of itself: its set-up, and snapshots of its state. Plain values, for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pedyra.allocate.orthogonality import layer_orthogonality
from pedyra.allocate.schedule import Schedule
from pedyra.config import RankConfig
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.layer_names import layer_place
from pedyra.lora.spectrum import effective_rank, singular_values


def describe(
    layers: Sequence[AdaptedLayer], config: RankConfig, schedule: Schedule, parameters: int, **of_schedule: Any
) -> dict[str, Any]:
    """The run as it was set up, with `parameters` at the start, and more fields of its schedule."""
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
                "cost": layer.cost,
            }
            for layer in layers
        ],
        "budget": {"kind": config.budget, "total_rank": sum(layer.rank for layer in layers), "parameters": parameters},
        "schedule": {
            "total_steps": schedule.total_steps,
            "initial_warmup": schedule.initial_warmup,
            "interval": schedule.interval,
            "final_warmup": schedule.final_warmup,
            "adjustments": list(schedule.adjustments),
            **of_schedule,
        },
        "scaling": {layer.name: layer.scaling for layer in layers},
        "config": config.to_dict(),
    }


@torch.no_grad()
def snapshot(layers: Sequence[AdaptedLayer], step: int, *, form: str, effective_ranks: bool) -> dict[str, Any]:
    """Diagnostics of the layers as they are, with Eq. (2) in this form. It waits for the device."""
    ranks = {layer.name: layer.rank for layer in layers}
    return {
        "kind": "snapshot",
        "step": step,
        "ranks": ranks,
        "total_rank": sum(ranks.values()),
        "parameters": sum(layer.parameters for layer in layers),
        "effective_rank": _effective_ranks(layers) if effective_ranks else None,
        "orthogonality": layer_orthogonality(layers, form=form),
    }


def _effective_ranks(layers: Sequence[AdaptedLayer]) -> dict[str, float]:
    factors = ((layer.name, layer.a.weight, layer.b.weight) for layer in layers)
    return {name: effective_rank(singular_values(A, B.new_ones(len(A)), B)) for name, A, B in factors}

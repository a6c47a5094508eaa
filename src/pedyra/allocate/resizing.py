"""A plan is carried out: layers, and the optimizer's state with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.optim import Optimizer

from pedyra.allocate.allocation import RankPlan
from pedyra.allocate.contract import Born
from pedyra.allocate.optimizer_checks import check_state
from pedyra.allocate.optimizer_state import move_state
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.resize import Replacement, install, resized


def carry_out(
    plan: RankPlan,
    layers: Sequence[AdaptedLayer],
    optimizer: Optimizer,
    born: Born | None,
    generator: torch.Generator,
    *,
    new_moments: str,
) -> dict[str, list[Replacement]]:
    """Prune and add as planned, and bring layers to the plan's scaling; what was replaced, by layer.

    Every new factor is built, and the optimizer's state checked, before anything is replaced. PEFT's config is not
    touched; see `attach.write_ranks`.

    Args:
        new_moments: see `optimizer_state.move_state`.

    Raises:
        ValueError: some state of the optimizer cannot follow.
    """
    changes: dict[str, list[Replacement]] = {}
    for layer in layers:
        pruned, num_new = plan.pruned.get(layer.name, ()), plan.added.get(layer.name, 0)
        if pruned or num_new:
            new = born(layer, pruned, num_new, generator) if born is not None and num_new else None
            changes[layer.name] = resized(layer, pruned, new)
    replacements = [replacement for change in changes.values() for replacement in change]
    check_state(optimizer, [replacement.old for replacement in replacements])
    changed = [layer for layer in layers if layer.name in changes]
    install((layer, changes[layer.name]) for layer in changed)
    for layer in layers:
        layer.rescale(plan.rescale.get(layer.name, 1.0))
    move_state(optimizer, replacements, new_moments=new_moments)
    return changes


@torch.no_grad()
def mask(layers: Sequence[AdaptedLayer], masked: Mapping[str, Sequence[int]]) -> None:
    """Set E of these triples to 0, in place; they and their state in the optimizer stay."""
    for layer in layers:
        layer.a.E[list(masked.get(layer.name, ()))] = 0.0

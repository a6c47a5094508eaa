"""EVA as a contender of the small benchmarks: its look at the inputs, and its start along their components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pedyra.bench.looks import Look, Setup
from pedyra.lora.attach import AdaptedLayer
from pedyra.methods.eva import EvaSettings

EVA_STEPS = 20
"""Batches whose inputs are looked at; the method takes as many as its components need to converge."""


@dataclass(frozen=True, kw_only=True)
class EvaLook(Look):
    """`gains` are parts of the variance of a layer's inputs."""

    components: dict[str, Tensor]
    """Orthonormal rows `(n, in)`, those of most variance first."""

    @torch.no_grad()
    def start(self, adapted: Sequence[AdaptedLayer]) -> None:
        """A's rows are the components, of length 1; B stays 0."""
        for layer in adapted:
            layer.a.A.copy_(self.components[layer.name][: layer.rank])


@torch.no_grad()
def eva_look(setup: Setup, *, steps: int = EVA_STEPS) -> EvaLook:
    """The principal components of every layer's inputs in the untouched model, at most rho r of them.

    Of all inputs of the look at once; PEFT's own start makes the same from one batch after another, nearly.
    """
    inputs: dict[str, list[Tensor]] = {name: [] for name in setup.layers}
    hooks = []
    for name in setup.layers:

        def keep(module: nn.Module, args: Any, kept: list[Tensor] = inputs[name]) -> None:
            kept.append(args[0].flatten(0, -2))

        hooks.append(setup.base.get_submodule(name).register_forward_pre_hook(keep))
    for _ in range(steps):
        setup.draw()(setup.base)
    for hook in hooks:
        hook.remove()
    most = round(EvaSettings().rho * setup.rank)
    gains, components = {}, {}
    for name, kept in inputs.items():
        x = torch.cat(kept)
        _, S, components[name] = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        gains[name] = (S.square() / S.square().sum())[:most].tolist()
    return EvaLook(steps=steps, gains=gains, components=components)

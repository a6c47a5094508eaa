"""PE-DyRA as a direct implementation does it, for comparison: what the paper's own code must cost.

An AdaLoRA adapter of 1.5 times the rank whose triples are masked, never removed; every score of every parameter at
every step, one parameter at a time; Eq. 2 as part of the loss, by autograd (PEFT's AdaLoRA adds it).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor, nn

from pedyra.methods.method import Hooks

_BETA = 0.85


class MaskedReference(Hooks):
    """Eqs. 3 to 7 and Algorithm 2 on masks over the E of every layer. `rank` triples per layer start unmasked."""

    def __init__(self, model: nn.Module, *, rank: int, interval: int, moves: int = 12) -> None:
        self.interval, self.steps = interval, 0
        self.layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, AdaLoraLayer)}
        self.moves = min(moves, len(self.layers))
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}
        self.energy: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            E = layer.lora_E["default"]
            self.masks[name] = (torch.arange(len(E), device=E.device) < rank)[:, None]
            layer.register_forward_pre_hook(lambda module, args, name=name: self._see(name, args[0]))

    @torch.no_grad()
    def gradients_complete(self) -> None:
        """Eq. 3, from the gradients of this step."""
        for name, layer in self.layers.items():
            for kind, parameter in self._factors(layer):
                key = f"{name}.{kind}"
                assert parameter.grad is not None
                product = (parameter * parameter.grad).abs()
                before = self.sensitivity.setdefault(key, torch.zeros_like(product))
                spread = self.uncertainty.setdefault(key, torch.zeros_like(product))
                self.sensitivity[key] = _BETA * before + (1 - _BETA) * product
                self.uncertainty[key] = _BETA * spread + (1 - _BETA) * (product - self.sensitivity[key]).abs()

    @torch.no_grad()
    def adjust(self) -> bool:
        """Mask the lowest triples and unmask as many in the best layers, after every interval; mask E always."""
        self.steps += 1
        due = self.steps % self.interval == 0
        if due:
            self._move()
        for name, layer in self.layers.items():
            layer.lora_E["default"].mul_(self.masks[name])
        return due

    def tensors(self) -> list[Tensor]:
        """What is kept from step to step."""
        return [*self.sensitivity.values(), *self.uncertainty.values(), *self.energy.values(), *self.masks.values()]

    def _move(self) -> None:
        scores = {name: self._scores(name, layer) for name, layer in self.layers.items()}
        active = [(float(s), n, i) for n, all in scores.items() for i, s in enumerate(all) if self.masks[n][i]]
        for _, name, index in sorted(active)[: self.moves]:
            self.masks[name][index] = False
        ranking = sorted(scores, key=lambda name: -float(scores[name].mean()))
        closed = {name: int((~mask).sum()) for name, mask in self.masks.items()}
        turns = sorted((turn, place, name) for place, name in enumerate(ranking) for turn in range(closed[name]))
        for _, _, name in turns[: self.moves]:  # one each down the ranking, again and again
            self.masks[name][(~self.masks[name][:, 0]).nonzero()[0]] = True

    def _scores(self, name: str, layer: Any) -> Tensor:
        importance = {k: self.sensitivity[f"{name}.{k}"] * self.uncertainty[f"{name}.{k}"] for k in "AEB"}
        by_gradient = importance["A"].mean(1) + importance["E"][:, 0] + importance["B"].mean(0)
        A, E, B = (parameter for _, parameter in self._factors(layer))
        by_input = E[:, 0].abs() * (A.abs() @ self.energy[name]) * B.norm(dim=0)
        return 0.5 * by_gradient + 0.5 * by_input

    def _factors(self, layer: Any) -> list[tuple[str, nn.Parameter]]:
        return [(kind, getattr(layer, f"lora_{kind}")["default"]) for kind in "AEB"]

    @torch.no_grad()
    def _see(self, name: str, x: Tensor) -> None:
        energy = x.float().pow(2).mean(dim=tuple(range(x.dim() - 1)))
        self.energy[name] = _BETA * self.energy.get(name, torch.zeros_like(energy)) + (1 - _BETA) * energy

"""SoRA (Ding et al. 2023): a gate per rank, shrunk to exact zeros by proximal steps; those ranks are cut at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
from transformers.trainer_pt_utils import get_parameter_names

from pedyra.allocate.contract import Method, Training, Work
from pedyra.allocate.schedule import check_count, check_number
from pedyra.lora.layer import AdaptedLayer
from pedyra.methods.slots import OWN_START, Factors, Slot, fill, linear, linear_slots, refuse_lora, write_plain


@dataclass(frozen=True, kw_only=True)
class Sora(Method):
    """SoRA (Ding et al. 2023): proximal steps close a gate per rank, and what is closed is cut at the end.

    dW = (alpha / r) B diag(g) A, with A and B as in LoRA and g ~ N(0, 1). Gates share the optimizer and its schedule
    with A and B, in a group without weight decay. A zero gate can open again, so all of the LoRA's r is trained to the
    end; what is saved has the rank that is left. The defaults are those of the authors' STS-B script.

    Departs from the authors' code, and why: soft-thresholding instead of a dead zone of 2 xi; the L1 gradient is added
    in closed form at the step, so it is not clipped with the others, and the loss that is logged is the task's; no
    LayerNorm is unfrozen, which makes theirs more than an adapter. Their schedule over xi with retraining at each stage
    is a sequence of runs, and not part of one. Raises ValueError: DoRA, rsLoRA or another start; fp16.
    """

    threshold: float = 3e-4
    """xi: how much every step takes off each gate's magnitude, whatever the learning rate. T steps take T xi."""
    l1: float = 10.0
    """lambda of the term lambda sum |g| / (number of gates) in the loss."""
    seed: int = 0
    """Seed of the gates."""

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, least=0)
        check_number("l1", self.l1, least=0)
        check_count("seed", self.seed, 0)

    def install(self, model: nn.Module, adapter: str = "default", training: Training | None = None) -> Gates:
        refuse_lora(model, adapter, "SoRA", (*OWN_START, "use_dora"))
        return Gates(model, adapter, self)


class GatedA(Slot):
    """The A slot maps x (..., in) -> g * x A^T (..., r), with A `(r, in)` and the gates g `(r, 1)`."""

    def __init__(self, A: nn.Parameter, gate: Tensor) -> None:
        super().__init__()
        self.A, self.gate = A, nn.Parameter(gate)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """diag(g) A"""
        return self.gate * self.A


def gated(model: nn.Module, adapter: str = "default", *, seed: int = 0) -> list[AdaptedLayer]:
    """Give every rank of a LoRA a gate g ~ N(0, 1)."""
    layers, generator = linear_slots(model, adapter), torch.Generator().manual_seed(seed)
    for layer in layers:
        gate = torch.randn(layer.rank, 1, generator=generator)
        fill(layer, GatedA(layer.a.A, gate.to(layer.a.A)), linear(layer.b.weight))
    return layers


def gates_of(layers: Sequence[AdaptedLayer]) -> list[nn.Parameter]:
    return [layer.a.gate for layer in layers]  # type: ignore[attr-defined, misc]


def soft_threshold(gate: Tensor, threshold: float) -> Tensor:
    """Return sign(g) max(|g| - xi, 0): the proximal map of xi |g|."""
    return gate.sign() * (gate.abs() - threshold).clamp(min=0)


def add_gate_steps(optimizer: Optimizer, gates: Sequence[nn.Parameter], settings: Sora) -> None:
    """Put the L1 term's gradient before, and the proximal step after, every step of `optimizer`, by its own hooks: they
    hold in any loop, and a step that is not taken shrinks nothing."""
    count = sum(gate.numel() for gate in gates)

    @torch.no_grad()
    def add_penalty(*_: Any) -> None:
        for gate in gates:
            if gate.grad is not None:
                gate.grad.add_(gate.sign(), alpha=settings.l1 / count)

    @torch.no_grad()
    def shrink_gates(*_: Any) -> None:
        for gate in gates:
            gate.copy_(soft_threshold(gate, settings.threshold))

    optimizer.register_step_pre_hook(add_penalty)
    optimizer.register_step_post_hook(shrink_gates)


def groups_with_gates(model: nn.Module, gates: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Group all that is trained: Trainer's two groups, no weight decay for biases and norms, then the gates without
    any."""
    gate_ids = {id(gate) for gate in gates}
    others = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in gate_ids}
    decays = {name for name in get_parameter_names(model, ALL_LAYERNORM_LAYERS) if "bias" not in name}
    return [
        {"params": [p for name, p in others.items() if name in decays], "weight_decay": weight_decay},
        {"params": [p for name, p in others.items() if name not in decays], "weight_decay": 0.0},
        {"params": list(gates), "weight_decay": 0.0},
    ]


class Gates(Work):
    """The gates of a model shrink while it trains, and are cut away at the end."""

    refused = {"fp16": "SoRA's gates are shrunk at unscaled steps only; use bf16"}

    def __init__(self, model: nn.Module, adapter: str, settings: Sora) -> None:
        self.model, self.adapter, self.settings = model, adapter, settings
        self.layers = gated(model, adapter, seed=settings.seed)

    def make_optimizer(self, kind: type[Optimizer], arguments: dict[str, Any], weight_decay: float) -> Optimizer:
        gates = gates_of(self.layers)
        optimizer = kind(groups_with_gates(self.model, gates, weight_decay), **arguments)
        add_gate_steps(optimizer, gates, self.settings)
        return optimizer

    @torch.no_grad()
    def end(self) -> None:
        """Leave out what has a zero gate and fold the others into A: plain LoRA at the scaling alpha / r of the start.
        A layer may lose all."""
        factors = {}
        for layer, gate in zip(self.layers, gates_of(self.layers), strict=True):
            open_ranks = gate.flatten().nonzero().flatten()
            factors[layer] = Factors(layer.a.weight[open_ranks], layer.b.weight[:, open_ranks], layer.scaling)
        write_plain(self.model, self.adapter, factors)

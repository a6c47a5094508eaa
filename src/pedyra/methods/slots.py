"""A method fills the slots of PEFT's LoRA layers itself, and they are ordinary slots again once it has trained.

PEFT's forward is `lora_B(lora_A(dropout(x))) * scaling`, and merging reads the `.weight` of both slots; so two modules
with a forward and a `weight` are a method. While it trains, the state dict, and so a checkpoint, holds the method's own
tensors under their own names: an exact resume needs them, and PEFT takes them for no LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn

from pedyra.errors import UserError
from pedyra.lora.attach import attach, detach
from pedyra.lora.factors import as_saved, linear
from pedyra.lora.layer import AdaptedLayer, holds_triples, peft_layers


@dataclass(frozen=True)
class Factors:
    """An ordinary LoRA layer is made of these: scaling * B A."""

    A: Tensor
    """`(r, in)`; r = 0 is the layer that adds nothing."""
    B: Tensor
    """`(out, r)`."""
    scaling: float


class Slot(nn.Module):
    """A filled slot has a `weight`, and maps by it."""

    bias = None  # an nn.Linear's attribute that PEFT reads
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def gradients_of(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return dloss/dp of each parameter; zeros for one that the loss does not know."""
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


OWN_START = ("init_lora_weights", "use_rslora")


def refuse_lora(model: Any, adapter: str, method: str, names: Sequence[str] = OWN_START) -> None:
    """Raise ValueError if one of these fields of the adapter's LoraConfig is not at its default; the method, of this
    name, has a start and a scaling of its own."""
    for name in names:
        default = LoraConfig.__dataclass_fields__[name].default
        value = getattr(getattr(model, "peft_config", {}).get(adapter), name, default)
        if value != default:
            own = f"{method} defines its own start and scaling"
            raise UserError(f"the LoRA has {name}={value!r}, but {own}; leave it at {default!r}")


def plain_ranks(model: nn.Module, adapter: str) -> list[int]:
    """List the ranks of the LoRA layers that hold no triples yet: none where a method has begun with them."""
    return [
        layer.module.r[adapter]
        for layer in peft_layers(model, adapter)
        if adapter in layer.module.lora_A and not holds_triples(layer)
    ]


def linear_slots(model: nn.Module, adapter: str) -> list[AdaptedLayer]:
    """List the LoRA layers of an adapter, in the model's order, with A and B as Parameters (`layer.a.A`,
    `layer.b.weight`), for the method to take over. Raises ValueError: a layer that is no linear one, or a bias of its
    own in B, which no slot here keeps."""
    for layer in peft_layers(model, adapter):
        if adapter in layer.module.lora_A and isinstance(layer.module.lora_A[adapter], Slot):
            raise UserError(
                f"{layer.name} is as a method left it whose training broke off; make the model anew, or go on from a "
                f"checkpoint in the Trainer that began"
            )
    layers = attach(model, adapter)
    for layer in layers:
        if layer.b.bias is not None:
            raise UserError(f"lora_bias is on, and {layer.name} would lose its bias; leave it out of the LoraConfig")
    return layers


def fill(layer: AdaptedLayer, a: nn.Module, b: nn.Module) -> None:
    """Put modules that map `(..., in) -> (..., r) -> (..., out)` into the slots of `layer`."""
    layer.module.lora_A[layer.adapter] = a.train(layer.module.training)
    layer.module.lora_B[layer.adapter] = b.train(layer.module.training)


@torch.no_grad()
def grow(model: nn.Module, adapter: str, num: int) -> None:
    """Give every plain LoRA layer `num` more ranks that add nothing, at the scaling that it has."""
    for layer in peft_layers(model, adapter):
        slots = layer.module.lora_A, layer.module.lora_B
        for slot, padding in zip(slots, ((0, 0, 0, num), (0, num)), strict=True):
            weight = slot[adapter].weight
            wider = nn.Parameter(F.pad(weight, padding), weight.requires_grad)
            slot[adapter] = linear(wider, slot[adapter].bias).train(slot[adapter].training)
        layer.module.r[adapter] += num


@torch.no_grad()
def write_plain(model: nn.Module, adapter: str, layers: Mapping[AdaptedLayer, Factors]) -> None:
    """Turn these layers into ordinary LoRA, with new Parameters, and bring PEFT's config in line. As on disk, rank 0 is
    one zero row."""
    for layer, factors in layers.items():
        A, B = as_saved(factors.A.detach(), None, 0), as_saved(factors.B.detach(), None, 1)
        fill(layer, *(linear(nn.Parameter(each.clone())) for each in (A, B)))
        layer.module.scaling[layer.adapter] = factors.scaling
    attach(model, adapter)  # brings PEFT's config in line with ranks and scalings
    detach(model, adapter)

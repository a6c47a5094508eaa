"""A method fills the slots of PEFT's LoRA layers itself, and they are ordinary slots again once it has trained.

PEFT's forward is `lora_B(lora_A(dropout(x))) * scaling`, and merging reads the `.weight` of both slots; so two modules
with a forward and a `weight` are a method. While it trains, the state dict, and so a checkpoint, holds the method's own
tensors under their own names: an exact resume needs them, and PEFT takes them for no LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from pedyra.errors import UserError
from pedyra.lora.attach import attach, detach
from pedyra.lora.factors import linear
from pedyra.lora.layer import AdaptedLayer


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


def linear_slots(model: PeftModel) -> list[AdaptedLayer]:
    """List the LoRA layers of adapter "default", in the model's order, once every one is known to be linear and plain.

    Their slots hold A and B as Parameters (`layer.a.A`, `layer.b.weight`), for the method to take over. Raises
    ValueError: a layer that is no linear one, or a bias of its own in B, which no slot here keeps.
    """
    layers = attach(model)
    for layer in layers:
        if layer.b.bias is not None:
            raise UserError(f"lora_bias is on, and {layer.name} would lose its bias; leave it out of the LoraConfig")
    return layers


def fill(layer: AdaptedLayer, a: nn.Module, b: nn.Module) -> None:
    """Put modules that map `(..., in) -> (..., r) -> (..., out)` into the slots of `layer`."""
    layer.module.lora_A[layer.adapter] = a.train(layer.module.training)
    layer.module.lora_B[layer.adapter] = b.train(layer.module.training)


@torch.no_grad()
def write_plain(model: PeftModel, layers: Mapping[AdaptedLayer, Factors]) -> None:
    """Turn these layers into ordinary LoRA, with new Parameters, and bring PEFT's config in line.

    As everywhere on disk, rank 0 is one zero row. What `save_pretrained` then writes loads without pedyra.
    """
    for layer, factors in layers.items():
        A, B = factors.A, factors.B
        if A.shape[0] == 0:
            A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1)
        fill(layer, *(linear(nn.Parameter(each.detach().clone())) for each in (A, B)))
        layer.module.scaling[layer.adapter] = factors.scaling
    attach(model)  # brings PEFT's config in line with ranks and scalings
    detach(model)

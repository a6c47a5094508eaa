"""PEFT's LoRA layers are found here, with triples in their slots or without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pedyra.lora.factors import AFactor, BFactor


@dataclass(frozen=True)
class AdaptedLayer:
    """A LoRA layer of PEFT, with its name in the base model. Its factors are looked up at each use, because a change of
    rank replaces them."""

    name: str
    module: Any
    """PEFT's LoraLayer."""
    adapter: str

    @property
    def a(self) -> AFactor:
        return self.module.lora_A[self.adapter]

    @property
    def b(self) -> BFactor:
        return self.module.lora_B[self.adapter]

    @property
    def factors(self) -> tuple[nn.Parameter, Tensor, nn.Parameter]:
        """Return A `(r, in)`, E `(r,)` and B `(out, r)`; E may be no Parameter, see `AFactor.train_e`."""
        a = self.a
        return a.A, a.E, self.b.weight

    @property
    def rank(self) -> int:
        return self.a.out_features

    @property
    def scaling(self) -> float:
        """Return alpha / r at attach, or what a method has made of it since."""
        return float(self.module.scaling[self.adapter])  # a tensor where the model is compiled

    def share_at(self, rank: int) -> float:
        """Return the scaling at this rank as a part of that of the start.

        All triples of a layer step the same way, so that a layer with eight times its rank takes steps eight times as
        large, and diverges at a rate that suits the others (research/ranks.md). So a method may have a layer halve its
        scaling, and double its B, each time that its rank has doubled (`AFactor.doubling`). The part depends on the
        rank alone, for weights that are loaded by their names, and powers of two leave every bit of the update.
        """
        if self.a.doubling is None:
            return 1.0
        return 0.5 ** max(0, (rank // self.a.doubling[0]).bit_length() - 1)

    @property
    def direction_parameters(self) -> int:
        """Count the trainable parameters of a triple: in + out, and 1 where E is trained, which no file has."""
        return self.a.in_features + self.b.out_features + int(self.a.E.requires_grad)

    @property
    def parameters(self) -> int:
        """Count the trainable parameters of all triples of the layer."""
        A, E, B = self.factors
        return A.numel() + B.numel() + (E.numel() if E.requires_grad else 0)

    def rescale(self, scaling: float) -> None:
        """Set the scaling, for the methods that define it by the current rank; see `write_ranks`."""
        if scaling == self.scaling:
            return
        if self.b.origin is not None:  # the part that the start took from the base weight stays the same
            self.b.origin = self.b.origin / (scaling / self.scaling)
        value = self.module.scaling[self.adapter]
        self.module.scaling[self.adapter] = torch.full_like(value, scaling) if isinstance(value, Tensor) else scaling


def adapted_layers(model: nn.Module, adapter_name: str = "default") -> list[AdaptedLayer]:
    """List the layers that hold triples now, in the model's order."""
    return [layer for layer in peft_layers(model, adapter_name) if holds_triples(layer)]


def peft_layers(model: nn.Module, adapter_name: str) -> Iterator[AdaptedLayer]:
    """Yield every LoRA layer of PEFT that has this adapter, with triples or without, in the model's order."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and (adapter_name in module.lora_A or adapter_name in module.lora_embedding_A):
            yield AdaptedLayer(name, module, adapter_name)


def holds_triples(layer: AdaptedLayer) -> bool:
    # An embedding has its slots elsewhere, and lora_A is empty.
    return layer.adapter in layer.module.lora_A and isinstance(layer.module.lora_A[layer.adapter], AFactor)

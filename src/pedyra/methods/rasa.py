"""RaSA (He et al. 2025): every layer gives k of its ranks to a pool that all layers of its type share."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pedyra.allocate.contract import Method, Training, Work
from pedyra.allocate.schedule import check_count
from pedyra.errors import UserError
from pedyra.lora.layer import AdaptedLayer
from pedyra.methods.slots import OWN_START, Factors, Slot, fill, linear_slots, refuse_lora, write_plain


@dataclass(frozen=True, kw_only=True)
class Rasa(Method):
    """RaSA (He et al. 2025): every layer gives k of its ranks to a pool that all layers of its type share.

    dW_l = [B_l, B_S] diag(d_l) [A_l; A_S]; of the LoRA's r ranks a layer, k are shared: r // 8, as in the authors'
    scripts, and at least 1. A layer's update has rank r - k + kL for LoRA's parameters and r - k + kL more, those of
    d_l. What is saved is unshared, and larger by as much: L times the pool.

    Departs from the authors' code, and why: a layer's place is found by any number in its name, theirs wants
    `layers.N.`; merging and export work, theirs refuses both. Raises ValueError: a LoRA of r = 1, no two layers of one
    type; DoRA, rsLoRA or another start.
    """

    seed: int = 0
    """Seed of the pools."""

    def __post_init__(self) -> None:
        check_count("seed", self.seed, 0)

    def install(self, model: nn.Module, adapter: str = "default", training: Training | None = None) -> Pools:
        refuse_lora(model, adapter, "RaSA", (*OWN_START, "use_dora"))
        return Pools(model, adapter, seed=self.seed)


class PooledA(Slot):
    """The A slot maps x (..., in) -> d * x [A; A_S]^T (..., r - k + kL), with private rows A `(r - k, in)` and one
    factor a rank, d `(r - k + kL, 1)`, which carries alpha.

    One layer of a type, the owner (None: this one), has the pool as parameters of its own: A_S `(kL, in)` and B_S
    `(out, kL)`. They lie flat in it, because peft 0.19 loads no module inside a factor. The others read them there.
    """

    pool_A: nn.Parameter
    pool_B: nn.Parameter

    def __init__(self, A: Tensor, d: Tensor, owner: PooledA | None) -> None:
        super().__init__()
        self.A, self.d = nn.Parameter(A), nn.Parameter(d)
        self._owner = (owner or self,)  # in a tuple, so that torch does not register it a second time

    @property
    def owner(self) -> PooledA:
        return self._owner[0]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """diag(d) [A; A_S]"""
        return self.d * torch.cat([self.A, self.owner.pool_A.to(self.A)])


class PooledB(Slot):
    """The B slot maps h (..., r - k + kL) -> h [B, B_S]^T (..., out). `B` is private, `(out, r - k)`."""

    def __init__(self, B: Tensor, owner: PooledA) -> None:
        super().__init__()
        self.B = nn.Parameter(B)
        self._owner = (owner,)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[B, B_S]"""
        return torch.cat([self.B, self._owner[0].pool_B.to(self.B)], 1)


def by_type(layers: list[AdaptedLayer]) -> list[list[AdaptedLayer]]:
    """Group the layers by type: the same name but for its numbers (layers.3, layer.3, h.3, ...), and the same shape."""
    types: dict[tuple[str, int, int], list[AdaptedLayer]] = {}
    for layer in layers:
        name = re.sub(r"(?<![^.])\d+(?![^.])", "*", layer.name)
        types.setdefault((name, layer.a.in_features, layer.b.out_features), []).append(layer)
    return list(types.values())


class Pools(Work):
    """Layers of one type train a pool together: of a fresh LoRA the first r - k ranks of a layer stay, and pools are
    drawn; B = 0. A_S is Kaiming-uniform as A is. d starts at 0.5 alpha / (r - k) for private ranks and 0.5 alpha / (kL)
    for shared ones; there is no scaling beside it."""

    def __init__(self, model: nn.Module, adapter: str = "default", *, seed: int = 0) -> None:
        self.model, self.adapter = model, adapter
        types = by_type(linear_slots(model, adapter))
        if all(len(layers) == 1 for layers in types):
            names = ", ".join(layers[0].name for layers in types[:3])
            raise UserError(
                f"no two layers of the LoRA are of one type and shape ({names}), so nothing is shared; "
                f"target a module of every block, or train plain LoRA"
            )
        if lowest := next((layer for layers in types for layer in layers if layer.rank < 2), None):
            raise UserError(
                f"{lowest.name} has rank {lowest.rank}, which leaves no rank to share beside a private one; raise the "
                f"LoRA's r to 2 or more"
            )
        generator = torch.Generator().manual_seed(seed)
        for layers in types:
            share(layers, generator)
        self.layers = [layer for layers in types for layer in layers]

    def end(self) -> None:
        """Give every layer its own copy of the pool, with d in A: plain LoRA of rank r - k + kL, the same function."""
        factors = {layer: Factors(layer.a.weight, layer.b.weight, 1.0) for layer in self.layers}
        write_plain(self.model, self.adapter, factors)


@torch.no_grad()
def share(layers: list[AdaptedLayer], generator: torch.Generator) -> None:
    """Have the layers of one type share a pool of k of the ranks of each."""
    L, first = len(layers), layers[0]
    k = max(1, first.rank // 8)
    bound = first.a.in_features**-0.5  # nn.init.kaiming_uniform_ with a = sqrt(5), PEFT's
    A_S = (2 * torch.rand(k * L, first.a.in_features, generator=generator) - 1).to(first.a.A) * bound
    owner = None
    for layer in layers:
        private, alpha = layer.rank - k, layer.scaling * layer.rank
        d = torch.cat([torch.full((private, 1), 0.5 * alpha / private), torch.full((k * L, 1), 0.5 * alpha / (k * L))])
        a = PooledA(layer.a.A[:private].clone(), d.to(A_S), owner)
        if owner is None:
            a.pool_A = nn.Parameter(A_S)
            a.pool_B = nn.Parameter(layer.b.weight.new_zeros(layer.b.out_features, k * L))
            owner = a
        fill(layer, a, PooledB(torch.zeros_like(layer.b.weight[:, :private]), owner))
        layer.module.scaling[layer.adapter] = 1.0

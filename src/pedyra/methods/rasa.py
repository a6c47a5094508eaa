"""RaSA (He et al. 2025): every layer gives k of its ranks to a pool that all layers of its type share."""

from __future__ import annotations

import re

import torch
from peft import PeftModel
from torch import Tensor, nn

from pedyra.errors import UserError
from pedyra.lora.layer import AdaptedLayer
from pedyra.methods.method import Adaptation, Method, Request
from pedyra.methods.own_factors import Factors, Slot, fill, linear_slots, write_plain


class PooledA(Slot):
    """The A slot maps x (..., in) -> d * x [A; A_S]^T (..., r - k + kL).

    One layer of a type, the owner, has the pool as parameters of its own: A_S `(kL, in)` and B_S `(out, kL)`. They lie
    flat in it, because peft 0.19 loads no module inside a factor. The other layers read them there.

    Args:
        A: private rows `(r - k, in)`.
        d: `(r - k + kL, 1)`, one factor a rank; it carries alpha.
        owner: who has the pool. None: this one; then `pool_A` and `pool_B` are to be set.
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


@torch.no_grad()
def share(model: PeftModel, *, k: int, alpha: float) -> list[AdaptedLayer]:
    """Turn a fresh LoRA of rank r into RaSA: the first r - k ranks of a layer stay, and pools are drawn; B = 0.

    A_S is Kaiming-uniform as A is, from torch's global generator. d starts at 0.5 alpha / (r - k) for private ranks and
    0.5 alpha / (kL) for shared ones; there is no scaling beside it. Raises ValueError: no two layers are of one
    type.
    """
    types = by_type(linear_slots(model))
    if all(len(layers) == 1 for layers in types):
        names = ", ".join(layers[0].name for layers in types[:3])
        raise UserError(
            f"lora.target_modules selects no two layers of one type and shape ({names}), so nothing is shared; "
            f"target a module of every block, or use method lora"
        )
    for layers in types:
        L, first = len(layers), layers[0]
        A_S = torch.empty(k * L, first.a.in_features, dtype=first.a.A.dtype, device=first.a.A.device)
        nn.init.kaiming_uniform_(A_S, a=5**0.5)
        owner = None
        for layer in layers:
            private = layer.rank - k
            d = torch.cat(
                [torch.full((private, 1), 0.5 * alpha / private), torch.full((k * L, 1), 0.5 * alpha / (k * L))]
            )
            a = PooledA(layer.a.A[:private].clone(), d.to(A_S), owner)
            if owner is None:
                a.pool_A = nn.Parameter(A_S)
                a.pool_B = nn.Parameter(layer.b.weight.new_zeros(layer.b.out_features, k * L))
                owner = a
            fill(layer, a, PooledB(torch.zeros_like(layer.b.weight[:, :private]), owner))
            layer.module.scaling[layer.adapter] = 1.0
    return [layer for layers in types for layer in layers]


def unshare(model: PeftModel, layers: list[AdaptedLayer]) -> None:
    """Give every layer its own copy of the pool, with d in A: plain LoRA of rank r - k + kL, the same function."""
    write_plain(model, {layer: Factors(layer.a.weight, layer.b.weight, 1.0) for layer in layers})


def prepare(request: Request) -> Adaptation:
    """Make RaSA of lora.r ranks a layer, k of them shared: dW_l = [B_l, B_S] diag(d_l) [A_l; A_S].

    k is lora.r // 8, as in the authors' scripts, and at least 1.

    A layer's update has rank r - k + kL for LoRA's parameters and r - k + kL more, those of d_l. What is saved is
    unshared, and larger by as much: L times the pool.

    Departs from the authors' code, and why: a layer's place is found by any number in its name, theirs wants
    `layers.N.`; merging and export work, theirs refuses both. Raises ValueError: lora.r of 1, no two layers of one
    type; DoRA, rsLoRA or another start.
    """
    request.refuse_lora("RaSA defines its own start and scaling", "init", "use_dora", "use_rslora")
    r = request.lora.r
    if r < 2:
        raise UserError(f"lora.r is {r}, which leaves no rank to share beside a private one; raise it to 2 or more")
    model = request.with_lora()
    layers = share(model, k=max(1, r // 8), alpha=request.lora.lora_alpha)
    return Adaptation(model=model, finish=lambda: unshare(model, layers))


METHOD = Method("rasa", "ranks shared by all layers of a type (He et al. 2025)", prepare)

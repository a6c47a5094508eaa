"""The arithmetic of a fused layer: y = x W^T + bias + s (x (E A)^T) B^T, with W and bias frozen, and its gradients.

Three ways to the same result. All take x `(..., in)`, W `(out, in)`, bias `(out,)` or None, A `(r, in)`, E `(r,)`,
B `(out, r)`, the scaling s, and an observer of x (E A)^T or None. The two autograd functions also take a `Handover`,
and then return x once more, for the next layer that sees it (`shared_input`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pedyra.lora.factors import Observer, observed
from pedyra.lora.shared_input import Handover


def composed(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, E: Tensor, B: Tensor, scaling: float,
    observer: Observer | None,
) -> Tensor:  # fmt: skip
    """By autograd's own operations, all of one dtype: for layers so small that calling a function costs more."""
    rows = x.reshape(-1, x.shape[-1])
    h = observed(rows @ (E[:, None] * A).T, observer)
    y = torch.addmm(F.linear(rows, weight, bias), h, B.T, alpha=scaling)
    return y.view(*x.shape[:-1], weight.shape[0])


class AddedToWeight(torch.autograd.Function):
    """y = x (W + s B E A)^T + bias, all float32. Saves x alone; the backward pass makes the sum again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, E: Tensor, B: Tensor, scaling: float,
        observer: Observer | None, link: Handover | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        x = x.detach()  # the graph must not hold x itself, see pass_on
        ctx.save_for_backward(x, weight, A, E, B)
        ctx.set_materialize_grads(False)
        ctx.scaling, ctx.observer, ctx.link = scaling, observer, link
        y = F.linear(x, torch.addmm(weight, B, E[:, None] * A, alpha=scaling), bias)
        return y, None if link is None else x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, passed: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return passed, *(None,) * 8
        if ctx.link is not None:
            ctx.link.open = False
        x, weight, A, E, B = ctx.saved_tensors
        to_x, _, _, to_A, to_E, to_B, *_ = ctx.needs_input_grad
        grad_x = grad_A = grad_E = grad_B = None
        with torch.autocast("cpu", enabled=False):
            rows, g = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
            folded = E[:, None] * A
            if to_A or to_E or to_B:
                grad_folded, grad_B = _factor_gradients(rows, g, folded, B, ctx.scaling, ctx.observer)
                grad_E = (grad_folded * A).sum(1) if to_E else None
                grad_A = grad_folded.mul_(E[:, None]) if to_A else None
            if to_x:
                summed = torch.addmm(weight, B, folded, alpha=ctx.scaling)
                grad_x = g @ summed if passed is None else passed.view(rows.shape).addmm_(g, summed)
                grad_x = grad_x.view(x.shape)
        return grad_x, None, None, grad_A, grad_E, grad_B if to_B else None, *(None,) * 3


# Tokens are taken in pieces of this many bytes of x and g, so that the second product with each finds it in the cache.
_PIECE_BYTES = 1024 * 1024


def _factor_gradients(
    x: Tensor, g: Tensor, folded: Tensor, B: Tensor, scaling: float, observer: Observer | None
) -> tuple[Tensor, Tensor]:
    """s (g B)^T x `(r, in)` and s g^T (x folded^T) `(out, r)`, from x `(tokens, in)`, g `(tokens, out)`.

    An `observer` sees the tokens piece by piece.
    """
    grad_folded, grad_B = x.new_zeros(B.shape[1], x.shape[1]), g.new_zeros(len(folded), g.shape[1])
    rows_of_B = B.T.contiguous()  # products of few rows, not of few columns: a quarter faster
    piece = max(64, _PIECE_BYTES // (4 * (x.shape[1] + g.shape[1])))
    for x_part, g_part in zip(x.split(piece), g.split(piece), strict=True):
        gradients = rows_of_B @ g_part.T
        grad_folded.addmm_(gradients, x_part, alpha=scaling)
        products = folded @ x_part.T
        if observer is not None:
            observer(products.T, scaling * gradients.T)
        grad_B.addmm_(products, g_part, alpha=scaling)
    return grad_folded, grad_B.T


class AddedToOutput(torch.autograd.Function):
    """y = x W^T + bias, and in place + s (x (E A)^T) B^T.

    Saves x in the type it is multiplied in, and x (E A)^T `(tokens, r)`.
    Under autocast all is computed in its type; otherwise the triples are computed in theirs and the sum in the wider
    of both, as PEFT does for a half-precision base with float32 adapters.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, E: Tensor, B: Tensor, scaling: float,
        observer: Observer | None, link: Handover | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        kind = x.device.type
        auto = torch.is_autocast_enabled(kind)
        base_type = torch.get_autocast_dtype(kind) if auto else weight.dtype
        own_type = base_type if auto else A.dtype
        with torch.autocast(kind, enabled=False):
            x = x.detach()
            rows = x.reshape(-1, x.shape[-1]).to(base_type)
            W = weight.to(base_type)
            y = rows @ W.T if bias is None else torch.addmm(bias.to(base_type), rows, W.T)
            h = rows.to(own_type) @ _folded(A, E, own_type).T
            if own_type == base_type:
                y.addmm_(h, B.to(own_type).T, alpha=scaling)
            else:
                y = y.to(torch.promote_types(base_type, own_type)).addmm_(h, B.T, alpha=scaling).to(base_type)
        ctx.save_for_backward(rows, h, weight, A, E, B)
        ctx.set_materialize_grads(False)
        ctx.types, ctx.scaling, ctx.observer, ctx.link = (base_type, own_type), scaling, observer, link
        ctx.shape, ctx.input_type = x.shape, x.dtype
        return y.view(*x.shape[:-1], weight.shape[0]), None if link is None else x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, passed: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return passed, *(None,) * 8
        if ctx.link is not None:
            ctx.link.open = False
        rows, h, weight, A, E, B = ctx.saved_tensors
        base_type, own_type = ctx.types
        to_x, _, _, to_A, to_E, to_B, *_ = ctx.needs_input_grad
        grad_x = grad_A = grad_E = grad_B = None
        with torch.autocast(gradient.device.type, enabled=False):
            g = gradient.reshape(-1, gradient.shape[-1])
            g_own = g.to(own_type)
            g_h = (g_own @ B.to(own_type)).mul_(ctx.scaling)  # (tokens, r)
            if ctx.observer is not None:
                ctx.observer(h, g_h)
            if to_B:  # as (r, out), which reads g along its rows
                grad_B = (h.T @ g_own).mul_(ctx.scaling).T.to(B.dtype)
            if to_A or to_E:
                grad_folded = (g_h.T @ rows.to(own_type)).to(A.dtype)
                grad_E = (grad_folded * A).sum(1) if to_E else None
                grad_A = grad_folded.mul_(E[:, None]) if to_A else None
            if to_x:
                W, folded = weight.to(base_type), _folded(A, E, own_type)
                if own_type == base_type == ctx.input_type and passed is not None:
                    grad_x = passed.view(rows.shape).addmm_(g, W).addmm_(g_h, folded)
                else:
                    grad_x = g @ W
                    if own_type == base_type:
                        grad_x.addmm_(g_h, folded)
                    else:
                        grad_x.add_((g_h @ folded).to(base_type))
                    grad_x = grad_x.to(ctx.input_type)
                    if passed is not None:
                        grad_x = passed.view(rows.shape).add_(grad_x)
                grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_A, grad_E, grad_B if to_B else None, *(None,) * 3


def _folded(A: Tensor, E: Tensor, dtype: torch.dtype) -> Tensor:
    return (E[:, None] * A).to(dtype)

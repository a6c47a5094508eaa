"""The arithmetic of a fused layer: y = x W^T + bias + s (x (E A)^T) B^T, with W and bias frozen, and its gradients.

Three ways to the same result. All take x `(..., in)`, W `(out, in)`, bias `(out,)` or None, A `(r, in)`, E `(r,)`,
B `(out, r)`, probes P `(q, in)` and Q `(out, q)` or None, and the scaling s. The two autograd functions also take a
`Handover`, and then return x once more, for the next layer that sees it (`shared_input`).

With probes y has the term s (x P^T) Q^T too. The one of the two that takes a gradient is zero (`gradient_sketch`), and
so is the term; nothing is left of it but that gradient: of Q, s g^T (x P^T); of P, s (g Q)^T x. Those are the gradients
of B and E A with P for E A, and with Q for B, so the fixed probe takes part in the products that make these.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pedyra.lora.observation import Observer, add_energy, observed
from pedyra.lora.shared_input import Handover


def composed(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, E: Tensor, B: Tensor, P: Tensor | None, Q: Tensor | None,
    scaling: float, energy: Tensor | None, observer: Observer | None,
) -> Tensor:  # fmt: skip
    """By autograd's own operations, all of one dtype: for layers so small that calling a function costs more."""
    rows = x.reshape(-1, x.shape[-1])
    folded = E[:, None] * A
    if P is not None and Q is not None:
        folded, B = torch.cat([folded, P.to(A)]), torch.cat([B, Q.to(B)], 1)
    h = rows @ folded.T
    if P is None:
        observed(h, observer)
    if energy is not None:
        add_energy(energy, h.detach()[:, len(A) :])
    y = torch.addmm(F.linear(rows, weight, bias), h, B.T, alpha=scaling)
    return y.view(*x.shape[:-1], weight.shape[0])


class AddedToWeight(torch.autograd.Function):
    """y = x (W + s B E A)^T + bias, all float32. Saves x alone; the backward pass makes the sum again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, E: Tensor, B: Tensor,
        P: Tensor | None, Q: Tensor | None, scaling: float, energy: Tensor | None, observer: Observer | None,
        link: Handover | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        x = x.detach()  # the graph must not hold x itself, see pass_on
        ctx.save_for_backward(x, weight, A, E, B, P if ctx.needs_input_grad[7] else Q)
        ctx.set_materialize_grads(False)
        ctx.scaling, ctx.energy, ctx.observer, ctx.link = scaling, energy, observer, link
        y = F.linear(x, torch.addmm(weight, B, E[:, None] * A, alpha=scaling), bias)
        return y, None if link is None else x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, passed: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return passed, *(None,) * 11
        if ctx.link is not None:
            ctx.link.open = False
        x, weight, A, E, B, fixed = ctx.saved_tensors
        to_x, _, _, to_A, to_E, to_B, to_P, to_Q, *_ = ctx.needs_input_grad
        grad_x = grad_A = grad_E = grad_B = grad_P = grad_Q = None
        with torch.autocast("cpu", enabled=False):
            rows, g = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
            folded = E[:, None] * A
            if to_A or to_E or to_B or to_P or to_Q:
                right = torch.cat([folded, fixed.to(A)]) if to_Q else folded
                left = torch.cat([B, fixed.to(B)], 1) if to_P else B
                grad_right, grad_left = _factor_gradients(rows, g, right, left, ctx.scaling, ctx.energy, ctx.observer)
                (grad_folded, grad_P), (grad_B, grad_Q) = _apart(grad_right, len(A), 0), _apart(grad_left, len(A), 1)
                grad_E = (grad_folded * A).sum(1) if to_E else None
                grad_A = grad_folded.mul_(E[:, None]) if to_A else None
            if to_x:
                summed = torch.addmm(weight, B, folded, alpha=ctx.scaling)
                grad_x = g @ summed if passed is None else passed.view(rows.shape).addmm_(g, summed)
                grad_x = grad_x.view(x.shape)
        return grad_x, None, None, grad_A, grad_E, grad_B if to_B else None, grad_P, grad_Q, *(None,) * 4


# Tokens are taken in pieces of this many bytes of x and g, so that the second product with each finds it in the cache.
_PIECE_BYTES = 1024 * 1024


def _factor_gradients(
    x: Tensor, g: Tensor, right: Tensor, left: Tensor, scaling: float, energy: Tensor | None, observer: Observer | None
) -> tuple[Tensor, Tensor]:
    """s (g left)^T x `(l, in)` and s g^T (x right^T) `(out, k)`, from x `(tokens, in)`, g `(tokens, out)`.

    Where it is given, `energy` `(q + 1,)` counts the tokens along the last q rows of `right`; an `observer`, which
    probes have none beside, sees the tokens piece by piece.
    """
    grad_right, grad_left = x.new_zeros(left.shape[1], x.shape[1]), g.new_zeros(len(right), g.shape[1])
    rows_left = left.T.contiguous()  # products of few rows, not of few columns: a quarter faster
    piece = max(64, _PIECE_BYTES // (4 * (x.shape[1] + g.shape[1])))
    for x_part, g_part in zip(x.split(piece), g.split(piece), strict=True):
        gradients = rows_left @ g_part.T
        grad_right.addmm_(gradients, x_part, alpha=scaling)
        products = right @ x_part.T
        if observer is not None:
            observer(products.T, scaling * gradients.T)
        grad_left.addmm_(products, g_part, alpha=scaling)
        if energy is not None:
            add_energy(energy, products[-len(energy) + 1 :].T)
    return grad_right, grad_left.T


def _apart(gradient: Tensor, rank: int, dim: int) -> tuple[Tensor, Tensor | None]:
    """The gradient of the triples and, beside it, of a probe, each in memory of its own; None where there is none."""
    if gradient.shape[dim] == rank:
        return gradient, None
    triples, probe = gradient.tensor_split([rank], dim)
    return triples.clone(memory_format=torch.contiguous_format), probe.clone(memory_format=torch.contiguous_format)


class AddedToOutput(torch.autograd.Function):
    """y = x W^T + bias, and in place + s (x (E A)^T) B^T.

    Saves x in the type it is multiplied in, and x (E A)^T `(tokens, r)`.
    Under autocast all is computed in its type; otherwise the triples are computed in theirs and the sum in the wider
    of both, as PEFT does for a half-precision base with float32 adapters.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, E: Tensor, B: Tensor,
        P: Tensor | None, Q: Tensor | None, scaling: float, energy: Tensor | None, observer: Observer | None,
        link: Handover | None,
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
        ctx.save_for_backward(rows, h, weight, A, E, B, P if ctx.needs_input_grad[7] else Q)
        ctx.set_materialize_grads(False)
        ctx.types, ctx.scaling, ctx.energy, ctx.link = (base_type, own_type), scaling, energy, link
        ctx.observer = observer
        ctx.shape, ctx.input_type = x.shape, x.dtype
        return y.view(*x.shape[:-1], weight.shape[0]), None if link is None else x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, passed: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return passed, *(None,) * 11
        if ctx.link is not None:
            ctx.link.open = False
        rows, h, weight, A, E, B, fixed = ctx.saved_tensors
        base_type, own_type = ctx.types
        to_x, _, _, to_A, to_E, to_B, to_P, to_Q, *_ = ctx.needs_input_grad
        grad_x = grad_A = grad_E = grad_B = grad_P = grad_Q = None
        with torch.autocast(gradient.device.type, enabled=False):
            g = gradient.reshape(-1, gradient.shape[-1])
            g_own = g.to(own_type)
            left = torch.cat([B, fixed.to(B)], 1) if to_P else B
            g_h = (g_own @ left.to(own_type)).mul_(ctx.scaling)  # (tokens, r), or (tokens, r + q)
            if ctx.observer is not None:
                ctx.observer(h, g_h)
            if to_Q:
                products = rows.to(own_type) @ fixed.to(own_type).T
                h = torch.cat([h, products], 1)
                if ctx.energy is not None:
                    add_energy(ctx.energy, products)
            if to_B or to_Q:  # as (r, out), which reads g along its rows
                grad_B, grad_Q = _apart((h.T @ g_own).mul_(ctx.scaling).T.to(B.dtype), len(A), 1)
            if to_A or to_E or to_P:
                grad_folded, grad_P = _apart((g_h.T @ rows.to(own_type)).to(A.dtype), len(A), 0)
                grad_E = (grad_folded * A).sum(1) if to_E else None
                grad_A = grad_folded.mul_(E[:, None]) if to_A else None
            if to_x:
                W, folded, g_h = weight.to(base_type), _folded(A, E, own_type), g_h[:, : len(A)]
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
        return grad_x, None, None, grad_A, grad_E, grad_B if to_B else None, grad_P, grad_Q, *(None,) * 4


def _folded(A: Tensor, E: Tensor, dtype: torch.dtype) -> Tensor:
    return (E[:, None] * A).to(dtype)

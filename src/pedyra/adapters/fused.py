"""Base layer and triples in one autograd function: PEFT's LoRA linear without its output-sized temporaries.

PEFT computes `base(x) + lora_B(lora_A(x)) * scaling`: three tensors of the output's size that live for an instant, and
as many of the input's size in the backward pass. Here the triples are added to the weight, where that is cheaper and
loses nothing, or in place to the output and to the input's gradient. Function and dtypes are PEFT's; only roundings
differ.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pedyra.adapters.factors import AFactor, BFactor


def fuse(module: nn.Module) -> bool:
    """Let one of PEFT's LoRA layers take the fused forward whenever that is exact; `unfuse` undoes it.

    Only the class of this one instance changes, so parameters, hooks, copies and pickles stay what they are. Returns
    whether the layer is of a kind that can ever be fused: plain linear base, no dropout, no variant (DoRA).
    """
    if type(module) is Linear:
        module.__class__ = FusedLinear
    return isinstance(module, FusedLinear) and any(_plain(module, name) for name in module.lora_A)


def unfuse(module: nn.Module) -> None:
    """The inverse of `fuse`; nothing for a layer that is not fused."""
    if isinstance(module, FusedLinear):
        module.__class__ = Linear  # pyright: ignore[reportAttributeAccessIssue] (a base class of the same layout)


class FusedLinear(Linear):
    """PEFT's LoRA linear that computes base and triples together where this is exact, else as PEFT does."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # A compiler fuses PEFT's own forward by itself, and sees through it.
        if args or kwargs or torch.compiler.is_compiling():
            return super().forward(x, *args, **kwargs)
        name = self._fusable_adapter(x)
        if name is None:
            return super().forward(x)
        base: Any = self.base_layer
        a: Any = self.lora_A[name]
        b: Any = self.lora_B[name]
        function = _AddedToWeight if _adds_to_weight(x, base.weight, a.A) else _AddedToOutput
        return function.apply(x, base.weight, base.bias, a.A, a.E, b.weight, self.scaling[name])

    def _fusable_adapter(self, x: Tensor) -> str | None:
        """The one active adapter, if base and triples can be computed together for this input; else None."""
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or not _plain(self, active[0]):
            return None
        name = active[0]
        weight: Any = self.base_layer.weight
        A = self.lora_A[name].A
        if not x.device == weight.device == A.device:
            return None
        if x.device.type == "cpu" and _tokens(x) * sum(weight.shape) < _LEAST_ELEMENTS:
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None if torch.float64 in (x.dtype, weight.dtype, A.dtype) else name
        casts = x.dtype == A.dtype or getattr(self, "cast_input_dtype_enabled", True)
        return name if x.dtype == weight.dtype and casts else None


# Of input and output together. With fewer, calling an autograd function costs a CPU more than it saves (measured
# from 128 to 4096 tokens and 256 to 1536 features, docs/performance.md).
_LEAST_ELEMENTS = 2**18


def _tokens(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _plain(module: Any, name: str) -> bool:
    """Whether a layer's forward is nothing but x W^T + bias + s (x (E A)^T) B^T, with the base frozen."""
    base, a, b = module.base_layer, module.lora_A[name], module.lora_B[name]
    return (
        type(base) is nn.Linear
        and type(base.weight) is nn.Parameter
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and type(a) is AFactor
        and type(b) is BFactor
        and a.E.dim() == 1
        and a.probe is None
        and a.live is None
        and b.probe is None
        and b.bias is None
        and a.A.dtype == a.E.dtype == b.weight.dtype
        and name not in getattr(module, "lora_variant", {})
        and not (module.training and getattr(module.lora_dropout[name], "p", 0.0) > 0)
        and not any(map(_is_hooked, (base, a, b)))
    )


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward, or another one (offloading, observers)."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks) or "forward" in module.__dict__


def _adds_to_weight(x: Tensor, weight: Tensor, A: Tensor) -> bool:
    """Whether W + s B E A costs less than to add the triples to each token's output, and rounds no worse.

    In full float32 the sum loses no more than the product x W^T rounds off anyway; in half precision, or where the
    hardware shortens float32 (TF32, bfloat16 passes), a small update would vanish in the weight's own rounding. On a
    GPU none of this has been measured.
    """
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or torch.get_float32_matmul_precision() != "highest":
        return False
    # 3: where the two were measured to cost the same; the sum is written twice, each token's output and gradient once.
    enough = _tokens(x) * sum(weight.shape) >= 3 * weight.numel()
    return enough and x.dtype == weight.dtype == A.dtype == torch.float32


class _AddedToWeight(torch.autograd.Function):
    """y = x (W + s B E A)^T + bias; x `(..., in)`, W `(out, in)`, A `(r, in)`, E `(r,)`, B `(out, r)`, all float32.

    Saves x and nothing else for the backward pass; the sum is made again there. W and bias are frozen.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, E: Tensor, B: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, A, E, B)
        ctx.scaling = scaling
        return F.linear(x, torch.addmm(weight, B, E[:, None] * A, alpha=scaling), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, E, B = ctx.saved_tensors
        to_x, _, _, to_A, to_E, to_B, _ = ctx.needs_input_grad
        grad_x = grad_A = grad_E = grad_B = None
        with torch.autocast("cpu", enabled=False):
            rows, g = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
            folded = E[:, None] * A
            if to_A or to_E or to_B:
                grad_folded, grad_B = _factor_gradients(rows, g, folded, B, ctx.scaling)
                grad_E = (grad_folded * A).sum(1) if to_E else None
                grad_A = grad_folded.mul_(E[:, None]) if to_A else None
            if to_x:
                grad_x = (g @ torch.addmm(weight, B, folded, alpha=ctx.scaling)).view(x.shape)
        return grad_x, None, None, grad_A, grad_E, grad_B if to_B else None, None


# Tokens are taken in pieces of this many bytes of x and g, so that the second product with each finds it in the cache.
_PIECE_BYTES = 512 * 1024


def _factor_gradients(x: Tensor, g: Tensor, folded: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """s (g B)^T x `(r, in)` and s g^T (x folded^T) `(out, r)`, from x `(tokens, in)` and g `(tokens, out)`."""
    grad_folded, grad_B = torch.zeros_like(folded), g.new_zeros(B.shape[1], B.shape[0])
    rows_B = B.T.contiguous()  # products of few rows, not of few columns: a quarter faster
    piece = max(64, _PIECE_BYTES // (4 * (x.shape[1] + g.shape[1])))
    for x_part, g_part in zip(x.split(piece), g.split(piece), strict=True):
        grad_folded.addmm_(rows_B @ g_part.T, x_part, alpha=scaling)
        grad_B.addmm_(folded @ x_part.T, g_part, alpha=scaling)
    return grad_folded, grad_B.T


class _AddedToOutput(torch.autograd.Function):
    """y = x W^T + bias + s (x (E A)^T) B^T; x `(..., in)`, W `(out, in)`, A `(r, in)`, E `(r,)`, B `(out, r)`.

    Saved for the backward pass: x in the type it is multiplied in, and x (E A)^T `(tokens, r)`. W and bias are frozen.
    Under autocast all is computed in its type; otherwise the triples are computed in theirs and the sum in the wider
    of both, as PEFT does for a half-precision base with float32 adapters.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, E: Tensor, B: Tensor, scaling: float
    ) -> Tensor:
        kind = x.device.type
        auto = torch.is_autocast_enabled(kind)
        base_type = torch.get_autocast_dtype(kind) if auto else weight.dtype
        own_type = base_type if auto else A.dtype
        with torch.autocast(kind, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(base_type)
            W = weight.to(base_type)
            y = rows @ W.T if bias is None else torch.addmm(bias.to(base_type), rows, W.T)
            h = rows.to(own_type) @ _folded(A, E, own_type).T
            if own_type == base_type:
                y.addmm_(h, B.to(own_type).T, alpha=scaling)
            else:
                y = y.to(torch.promote_types(base_type, own_type)).addmm_(h, B.T, alpha=scaling).to(base_type)
        ctx.save_for_backward(rows, h, weight, A, E, B)
        ctx.types, ctx.scaling, ctx.shape, ctx.input_type = (base_type, own_type), scaling, x.shape, x.dtype
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, h, weight, A, E, B = ctx.saved_tensors
        base_type, own_type = ctx.types
        to_x, _, _, to_A, to_E, to_B, _ = ctx.needs_input_grad
        grad_x = grad_A = grad_E = grad_B = None
        with torch.autocast(gradient.device.type, enabled=False):
            g = gradient.reshape(-1, gradient.shape[-1])
            g_own = g.to(own_type)
            g_h = (g_own @ B.to(own_type)).mul_(ctx.scaling)  # (tokens, r)
            if to_B:  # as (r, out), which reads g along its rows
                grad_B = (h.T @ g_own).mul_(ctx.scaling).T.to(B.dtype)
            if to_A or to_E:
                grad_folded = (g_h.T @ rows.to(own_type)).to(A.dtype)  # (r, in)
                grad_E = (grad_folded * A).sum(1) if to_E else None
                grad_A = grad_folded.mul_(E[:, None]) if to_A else None
            if to_x:
                grad_x = g @ weight.to(base_type)
                folded = _folded(A, E, own_type)
                if own_type == base_type:
                    grad_x.addmm_(g_h, folded)
                else:
                    grad_x.add_((g_h @ folded).to(base_type))
                grad_x = grad_x.to(ctx.input_type).view(ctx.shape)
        return grad_x, None, None, grad_A, grad_E, grad_B, None


def _folded(A: Tensor, E: Tensor, dtype: torch.dtype) -> Tensor:
    return (E[:, None] * A).to(dtype)

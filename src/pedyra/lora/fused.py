"""Base layer and triples computed together: PEFT's LoRA linear without its output-sized temporaries.

PEFT computes `base(x) + lora_B(lora_A(x)) * scaling`: three tensors of the output's size that live for an instant, and
as many of the input's size in the backward pass. Here the triples are added to the weight, where that is cheaper and
loses nothing, or in place to the output and to the input's gradient. Function and dtypes are PEFT's; only roundings
differ. This file decides what runs; the arithmetic is in `fused_functions`.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from pedyra.lora.factors import AFactor, BFactor
from pedyra.lora.fused_functions import AddedToOutput, AddedToWeight, composed
from pedyra.lora.shared_input import handover, pass_on, passed_on


def fuse(module: nn.Module) -> bool:
    """Let one of PEFT's LoRA layers take the fused forward whenever that is exact; `unfuse` undoes it.

    Only the class of this one instance changes, so parameters, hooks, copies and pickles stay what they are. Returns
    whether the layer is of a kind that can ever be fused: plain linear base, no dropout, no variant (DoRA).
    """
    if type(module) is Linear:
        module.__class__ = FusedLinear
    return isinstance(module, FusedLinear) and any(
        _plain(module, name) and not _drops(module, name) for name in module.lora_A
    )


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
        operands = base.weight, base.bias, a.A, a.E, b.weight, self.scaling[name], a.observer
        to_weight = _adds_to_weight(x, base.weight, a.A)
        if _composes(x, base.weight, a.A, _LEAST_ELEMENTS[to_weight]):
            return composed(x, *operands)
        function = AddedToWeight if to_weight else AddedToOutput
        link = handover(x)
        if link is None:
            return function.apply(x, *operands, None)[0]
        y, passed = function.apply(passed_on(x), *operands, link)
        pass_on(x, passed, link)
        return y

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
        if torch.is_autocast_enabled(x.device.type):
            return None if torch.float64 in (x.dtype, weight.dtype, A.dtype) else name
        casts = x.dtype == A.dtype or getattr(self, "cast_input_dtype_enabled", True)
        return name if x.dtype == weight.dtype and casts else None


# Of input and output together, for the function that adds to the output, and for the one that adds to the weight. With
# fewer, calling an autograd function costs a CPU more than it saves (measured from 64 to 2048 tokens and 64 to 1536
# features, docs/performance.md).
_LEAST_ELEMENTS = (2**18, 2**17)


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
        and b.bias is None
        and a.A.dtype == a.E.dtype == b.weight.dtype
        and name not in getattr(module, "lora_variant", {})
        and not (module.training and _drops(module, name))
        and not any(map(_is_hooked, (base, a, b)))
    )


def _drops(module: Any, name: str) -> bool:
    return getattr(module.lora_dropout[name], "p", 0.0) > 0


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward, or another one (offloading, observers)."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks) or "forward" in module.__dict__


def _composes(x: Tensor, weight: Tensor, A: Tensor, least_elements: int) -> bool:
    """Whether a layer is too small for a function of its own, and of one dtype."""
    if x.device.type != "cpu" or _tokens(x) * sum(weight.shape) >= least_elements:
        return False
    return x.dtype == weight.dtype == A.dtype and not torch.is_autocast_enabled("cpu")


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

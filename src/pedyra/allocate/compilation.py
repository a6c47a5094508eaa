"""torch.compile through rank changes: ranks are marked dynamic, so that no adjustment needs a new graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pedyra.allocate.contract import RankMethod
from pedyra.lora.layer import AdaptedLayer


def is_compiled(model: nn.Module) -> bool:
    """Whether `model` went through `torch.compile(model)` or `model.compile()`."""
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def check_compiles(method: RankMethod) -> None:
    """Raise ValueError for a method that sees nothing inside a compiled model."""
    if not method.compiles:
        raise ValueError(
            "method pedyra reads gradients inside the layers, where a compiled model shows none; train without "
            "torch.compile, or by method pedyra-paper"
        )


def mark_ranks(layers: Sequence[AdaptedLayer]) -> None:
    """Mark the rank dimension of every A, E and B as dynamic; to be done again for the new Parameters of a resize.

    Turns off, for the whole process, torch's assumption that a parameter never changes its shape. Ranks 0 and 1 are
    constants to the compiler: a layer that comes down to one costs a graph of its own.
    """
    import torch._dynamo  # takes a second to import: only who compiles pays

    torch._dynamo.config.force_parameter_static_shapes = False
    for layer in layers:
        if layer.rank > 1:
            for parameter, dim in zip(layer.factors, (0, 0, 1), strict=True):
                torch._dynamo.mark_dynamic(parameter, dim)

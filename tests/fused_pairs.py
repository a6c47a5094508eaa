"""The same layers under PEFT's forward and under the fused one, and how near their results are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pedyra.lora.attach import attach
from pedyra.lora.fused import fuse


def fuse_all(model: Any) -> Any:
    for layer in attach(model):
        fuse(layer.module)
    return model


def pair(make: Callable[..., Any], **settings: Any) -> tuple[Any, Any]:
    """The same attached model twice, with E off its start, the second one fused."""
    models = make(**settings), make(**settings)
    for model in models:
        for layer in attach(model):
            with torch.no_grad():
                layer.a.E.copy_(torch.linspace(0.5, 1.5, len(layer.a.E)))
    return models[0], fuse_all(models[1])


def outcome(model: Any, x: Tensor, context: Any = None) -> dict[str, Tensor]:
    """The output, the gradients of the input and of every trainable parameter, of a loss that weighs them all."""
    x = x.detach().clone().requires_grad_()
    with context or torch.enable_grad():
        y = model(x)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    (y.float() * weights).sum().backward()
    gradients = {name: tensor.grad for name, tensor in trained(model).items()}
    assert x.grad is not None and all(gradient is not None for gradient in gradients.values())
    return {"output": y.detach(), "input": x.grad, **gradients}  # type: ignore[dict-item]


def trained(model: Any) -> dict[str, Tensor]:
    """Every parameter that is trained."""
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def clear(model: Any) -> None:
    for tensor in trained(model).values():
        tensor.grad = None


def in_float32(model: Any, x: Tensor) -> dict[str, Tensor]:
    return outcome(copy.deepcopy(model).float(), x.float())


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of each tensor, relative to the largest value in it."""
    assert one.keys() == other.keys()
    return {
        name: float((one[name].float() - other[name].float()).abs().max() / other[name].abs().max()) for name in one
    }


def assert_same(fused: dict[str, Tensor], plain: dict[str, Tensor], tolerance: float = 4e-6) -> None:
    """Equal types, and equal values but for roundings; float32 has an eps of 1.2e-7."""
    assert [value.dtype for value in fused.values()] == [value.dtype for value in plain.values()]
    assert max(distance(fused, plain).values()) <= tolerance


def assert_as_near(fused: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Equal types, and in half precision no farther from the float32 values than PEFT's own forward is."""
    assert [value.dtype for value in fused.values()] == [value.dtype for value in plain.values()]
    ours, theirs = distance(fused, exact), distance(plain, exact)
    assert sum(ours.values()) <= 2 * sum(theirs.values())  # so few roundings leave much to chance
    assert max(ours.values()) <= 0.1  # a missing or doubled term is of the order of 1

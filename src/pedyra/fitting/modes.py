"""A live model is put into another mode while it is measured, and back: evaluated, frozen, or without its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from peft.helpers import DoraCaching
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@contextmanager
def evaluating(model: nn.Module, checkpointing: bool = False) -> Iterator[None]:
    """While it lasts, the model is in evaluation mode.

    Args:
        checkpointing: layers that checkpoint their activations in training go on to do so, so that a backward pass
            needs no more memory than training did. transformers asks their own `training` for it; all that is inside
            of them is in evaluation mode. The few that drop out in their own forward (BART, OPT, Falcon) do so then,
            which adds noise to the directions and none to the proof.
    """
    training = {module: module.training for module in model.modules()}
    for module in training:
        checkpoints = checkpointing and getattr(module, "gradient_checkpointing", False)
        module.training = _is_packable(module) or checkpoints
    try:
        with DoraCaching(enabled=False):  # which keeps the norms of other factors under the same name
            yield
    finally:
        for module, on in training.items():
            module.training = on


def _is_packable(module: nn.Module) -> bool:
    """Tell whether it is a 4-bit layer of bitsandbytes: in evaluation mode its forward packs the weight for the
    processor, after which there is no backward pass. It does nothing else in this mode."""
    of_bitsandbytes = type(module).__module__.startswith("bitsandbytes.")
    return of_bitsandbytes and type(getattr(module, "weight", None)).__name__ == "Params4bit"


def unpack(model: Any) -> None:
    """Undo that packing where an evaluation has done it: bitsandbytes does so as it saves."""
    for module in filter(_is_packable, model.modules()):
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):  # pyright: ignore[reportAttributeAccessIssue]
            module.state_dict()


@contextmanager
def checkpointing(model: Any, args: Any) -> Iterator[None]:
    """While it lasts, layers checkpoint their activations where a Trainer's arguments ask for it, which its `train`
    alone switches on: a fit may be of a model that was loaded."""
    should = any(getattr(args, f"{kind}_checkpointing", False) for kind in ("activation", "gradient"))
    base = model.get_base_model()
    on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if not should or on or not getattr(base, "supports_gradient_checkpointing", False):
        yield
        return
    kind = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    getattr(base, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(base, f"{kind}_checkpointing_disable")()
        base.disable_input_require_grads()  # which came with it


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """While it lasts, nothing is trained. Afterwards the same is as before, and has the gradients that it had.

    A loss that switches adapters (DPO's reference) makes their Parameters trainable meanwhile. They are frozen again
    before they are used, since a checkpointed layer has to run the same twice.
    """
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for parameter, _, _ in before:
        parameter.grad = None

    own = {parameter for parameter, _, _ in before}

    def freeze(module: nn.Module, *_: Any) -> None:
        # A LoRA layer may read its slots without calling them.
        for parameter in module.parameters(recurse=isinstance(module, BaseTunerLayer)):
            if parameter in own:
                parameter.requires_grad_(False)

    model.apply(freeze)
    handles = [module.register_forward_pre_hook(freeze) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, trained, gradient in before:
            parameter.requires_grad_(trained)
            parameter.grad = gradient


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """While it lasts, the model is the base model, in evaluation mode. What disables the adapter itself for a while, as
    the reference of DPO does, leaves it disabled."""
    with evaluating(model), model.disable_adapter():
        model.disable_adapter = nullcontext
        try:
            yield
        finally:
            del model.disable_adapter


def use_averaged(optimizer: Any) -> None:
    """Have the model hold the weights that are evaluated, where an optimizer has two sets (schedule-free), as Trainer's
    own evaluation does; the next training step puts the others back."""
    if callable(getattr(optimizer, "eval", None)):
        optimizer.eval()

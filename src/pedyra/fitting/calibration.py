"""A pass over some batches that measures every LoRA layer of a model: Gramians, and gate slopes batch by batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pedyra.errors import UserError
from pedyra.fitting.gramians import Calibration, Gramians
from pedyra.fitting.judge import Batch, Judge
from pedyra.lora.layer import peft_layers, rank_parameters
from pedyra.lora.supported import check_supported, kind_of_module


def lora_layers(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """Name in the base model -> PEFT's LoraLayer, for every linear layer that holds the adapter. Raises ValueError: no
    such adapter, or a layer (embedding, convolution, AdaLoRA's) that a fit does not take."""
    found = {layer.name: layer.module for layer in peft_layers(model, adapter)}
    if not found:
        raise UserError(f"the model has no LoRA adapter named {adapter!r}; load one, or pass its name")
    kinds = {name: kind for name, module in found.items() if (kind := kind_of_module(module, adapter))}
    configs: Any = getattr(model, "peft_config", {})  # one that is wrapped for several processes has none
    kind_of_adapter = {"peft_type": configs[adapter].peft_type} if adapter in configs else {}
    check_supported("fit", f"adapter {adapter!r}", kind_of_adapter, kinds)
    return found


def layer_has_more(module: Any, adapter: str) -> bool:
    """Whether a layer has a magnitude, or a bias of its own factors."""
    return adapter in module.lora_magnitude_vector or module.lora_B[adapter].bias is not None


def calibrate(judge: Judge, batches: Iterable[Batch], *, adapter: str = "default") -> Calibration:
    """One forward and backward pass per batch, in evaluation mode; no weight and no gradient of the model changes.

    The processes of accelerate have other batches, as many each; all of them are given the same.

    Raises:
        ValueError: no batch, or none whose loss is finite; a layer that was not seen.
    """
    layers = lora_layers(judge.model, adapter)
    slots = {name: module.lora_A[adapter] for name, module in layers.items()}
    gramians = Gramians({name: slot.weight for name, slot in slots.items()})
    called: set[str] = set()
    total = 0
    with measuring(judge, slots, gramians, called) as measure:
        for batch in batches:
            total += 1
            measure(batch)
    if not total:
        raise UserError("there is no calibration batch, and it takes two; give more rows")
    sizes = {
        name: rank_parameters(slots[name].weight.shape[1], module.lora_B[adapter].weight.shape[0])
        for name, module in layers.items()
    }
    found = gramians.calibration(sizes, gather_object)
    total = sum(gather_object([total]))
    if len(found.samples) < 2:
        raise UserError(
            f"{len(found.samples)} of {total} calibration batches have a finite loss, and it takes two; give more rows"
        )
    _check_seen(found, layers, adapter, set(gather_object([*called])))
    return found


@contextmanager
def measuring(
    judge: Judge, slots: Mapping[str, nn.Module], gramians: Gramians, called: set[str]
) -> Iterator[Callable[[Batch], None]]:
    """While it lasts, what it gives measures a batch into `gramians`, a forward and a backward pass.

    Args:
        slots: layer -> its A slot.
        called: gets the layers that were.
    """

    def measure(batch: Batch) -> None:
        value = judge.trained_loss(batch)
        if value.requires_grad:
            value.backward()
        samples = torch.tensor(judge.samples(batch), device=value.device)
        gramians.close(torch.where(value.detach().isfinite(), samples, 0.0), judge.loss_scale)

    _unpack(judge.model)
    with evaluating(judge.model, checkpointing=True), frozen(judge.model), _reading(slots, gramians, called):
        yield measure


def seconds_a_batch(judge: Judge, trained: Batch, held: Batch, adapter: str = "default") -> tuple[float, float]:
    """Of calibration by the first, and of evaluation of the second with its metrics: each of a second pass. A held-out
    batch may have more rows than a backward pass has room for."""
    slots = {name: module.lora_A[adapter] for name, module in lora_layers(judge.model, adapter).items()}
    found = []
    with measuring(judge, slots, Gramians({name: slot.weight for name, slot in slots.items()}), set()) as measure:
        for _ in range(2):
            began = time.perf_counter()
            measure(trained)
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            found.append(time.perf_counter() - began)
    for _ in range(2):
        began = time.perf_counter()
        list(judge.losses([held], lambda: evaluating(judge.model), []))
        found.append(time.perf_counter() - began)
    return found[1], found[3]


def _check_seen(found: Calibration, layers: Mapping[str, Any], adapter: str, called: set[str]) -> None:
    """Raise ValueError for a layer that does something and was not measured: its directions would seem worthless.

    A direction does nothing whose column of B is zero, as LoRA begins, or whose row of A is, as a triple with E = 0.
    """
    for name, module in layers.items():
        A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        if found.layers[name].tokens_per_sample or not (A.any(1) & B.any(0)).any():
            continue
        if name in called:
            raise UserError(
                f"no gradient reached {name} in the calibration, although its adapter is not zero, so what its "
                f"directions are worth is unknown: the loss does not depend on it, or what computes it cuts the "
                f"gradient; load the adapter in plain PEFT with `pedyra fit FOLDER`, or leave the layer out of it"
            )
        raise UserError(
            f"the calibration saw no token in {name}, so what its directions are worth is unknown: a fused kernel "
            f"reads its weights and does not call it, or no token reached it (an expert); load the adapter in plain "
            f"PEFT with `pedyra fit FOLDER`, give more rows, or leave the layer out of the adapter"
        )


@contextmanager
def _reading(slots: Mapping[str, nn.Module], gramians: Gramians, called: set[str]) -> Iterator[None]:
    """While it lasts, what the A slots give is a leaf of the graph, and is seen with its gradient."""

    def reader(name: str) -> Callable[..., Tensor]:
        observe = gramians.observer(name)

        def read(module: nn.Module, args: tuple[Any, ...], h: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return h
            called.add(name)
            if not h.requires_grad:
                h = h.detach().requires_grad_()
            seen = h.detach()  # a hook that held h itself would keep it alive
            h.register_hook(lambda g: observe(seen, g))
            return h

        return read

    handles = [slot.register_forward_hook(reader(name)) for name, slot in slots.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def checkpointing(model: Any, args: Any) -> Iterator[None]:
    """While it lasts, layers checkpoint their activations where a Trainer's arguments ask for it, which its `train`
    alone switches on: a fit may be of a model that was loaded."""
    asked = any(getattr(args, f"{kind}_checkpointing", False) for kind in ("activation", "gradient"))
    base = model.get_base_model()
    on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if not asked or on or not getattr(base, "supports_gradient_checkpointing", False):
        yield
        return
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    disable = getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable
    hooks = {name: vars(base).pop(name) for name in _HOOKS_OF_INPUTS if name in vars(base)}
    enable({"use_reentrant": False})
    # With it come hooks by which what the embeddings give takes a gradient, which this way of checkpointing needs not.
    made = [vars(base).pop(name) for name in _HOOKS_OF_INPUTS if name in vars(base)]
    for given in made:
        for handle in given if isinstance(given, list) else [given]:
            handle.remove()  # a second time does nothing
    vars(base).update(hooks)
    try:
        yield
    finally:
        disable()


_HOOKS_OF_INPUTS = ("_require_grads_hooks", "_require_grads_hook")
"""Where transformers keeps the handles of its `enable_input_require_grads`."""


@contextmanager
def evaluating(model: nn.Module, checkpointing: bool = False) -> Iterator[None]:
    """While it lasts, the model is in evaluation mode.

    Args:
        checkpointing: layers that were told to checkpoint their activations go on to do so, for a backward pass that
            needs no more memory than training did. transformers asks their own `training`, by which some of them also
            drop out in their own forward, at a rate of their own (BART, T5, Starcoder2) or of their config (Falcon,
            and the layers of Wav2Vec2): all rates are 0 meanwhile. Dropout modules inside are in evaluation mode.
    """
    training = {module: module.training for module in model.modules()}
    rates: dict[tuple[int, str], tuple[Any, float]] = {}
    for module in training:
        checkpoints = checkpointing and getattr(module, "gradient_checkpointing", False)
        module.training = _is_packable(module) or checkpoints
        if checkpoints:
            for held in (module, getattr(module, "config", None)):
                found = getattr(held, "__dict__", {}).items()
                rates |= {(id(held), name): (held, rate) for name, rate in found if _is_drop_rate(name, rate)}
    for (_, name), (held, _) in rates.items():
        setattr(held, name, 0.0)
    try:
        yield
    finally:
        for module, on in training.items():
            module.training = on
        for (_, name), (held, rate) in rates.items():
            setattr(held, name, rate)


def _is_drop_rate(name: str, value: Any) -> bool:
    return "drop" in name and isinstance(value, float)


def _is_packable(module: nn.Module) -> bool:
    """Whether it is a 4-bit layer of bitsandbytes: in evaluation mode its forward packs the weight for the processor,
    after which there is no backward pass. It does nothing else in this mode."""
    of_bitsandbytes = type(module).__module__.startswith("bitsandbytes.")
    return of_bitsandbytes and type(getattr(module, "weight", None)).__name__ == "Params4bit"


def _unpack(model: Any) -> None:
    """Undo that packing where an evaluation has done it: bitsandbytes does so as it saves."""
    for module in filter(_is_packable, model.modules()):
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):  # pyright: ignore[reportAttributeAccessIssue]
            module.state_dict()


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


@contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """While it lasts, an optimizer with two sets of weights (schedule-free) has the model hold those of evaluation."""
    training = use_averaged(optimizer)
    try:
        yield
    finally:
        if training:
            getattr(optimizer, "optimizer", optimizer).train()


def use_averaged(optimizer: Any) -> bool:
    """Have the model hold the weights of evaluation, as in `averaged`, from now on; whether it held the others."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not callable(getattr(inner, "eval", None)):
        return False
    training = any(group.get("train_mode") for group in inner.param_groups)
    inner.eval()
    return training

"""Triples begin as A, B and E of `start="svd"`, or by a start of PEFT that takes a part of the weight W.

PiSSA, OLoRA, CorDA and LoRA-GA leave W - s B0 A0 in the layer. Pruning a triple would therefore remove a part of the
pre-trained weight. So the initial value of each triple is kept, and is added back to the weight when the triple is
pruned: pruning removes what training added, and no more. The file holds the update of the original weight,
s (B E A - B0 A0), and loads without pedyra.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.other import EMBEDDING_LAYER_NAMES, transpose
from torch import Tensor, nn

from pedyra.errors import UserError
from pedyra.lora.factors import ANOTHER_START, Start
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.singular import singular


def takes_from_weight(init: object) -> bool:
    """Tell whether `init` (LoraConfig's init_lora_weights) is one of those starts. PEFT takes OLoRA too."""
    return isinstance(init, str) and init.lower().startswith(("pissa", "olora", "corda", "lora_ga"))


def check_start(model: nn.Module, layers: Sequence[AdaptedLayer], init: str) -> None:
    """Refuse a layer whose weight cannot take an initial triple back (quantised, sharded), or is saved with the adapter
    (PEFT saves those of its `EMBEDDING_LAYER_NAMES`); and triples that were trained before, because that training
    would be mistaken for a part of the start and lost on saving."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    heads = EMBEDDING_LAYER_NAMES if hasattr(base, "get_input_embeddings") else ()
    for layer in layers:
        weight = getattr(layer.module.get_base_layer(), "weight", None)
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise UserError(
                f"the {init!r} start gives the triples of {layer.name} a part of its weight, which is quantised "
                f"or sharded ({type(weight).__name__}) and could not take it back when one is pruned; use the default "
                f"start (init_lora_weights=True), or load the base model in float"
            )
        if layer.name.split(".")[-1] in heads:
            raise UserError(
                f"the {init!r} start rewrites the weight of {layer.name}, which PEFT saves with the adapter, so that "
                f"it could not be loaded again; leave it out with LoraConfig(exclude_modules=[{layer.name!r}]), or use "
                f"the default start"
            )
        if not is_start(layer, init):
            raise UserError(
                f"the factors of {layer.name} are not those with which {init!r} begins: they were trained already (or "
                f"another adapter has changed this weight), and what that gave would be lost on saving. Save the "
                f"adapter relative to the untouched base, "
                f"save_pretrained(..., path_initial_model_for_weight_conversion=...), as PEFT documents, load that "
                f"folder and train on"
            )


ROUNDED, TF32 = 2 * torch.finfo(torch.bfloat16).eps, 2.0**-10
"""Relative rounding errors of a factor or a weight in 16 bits, and of a product in TF32; doubled, so that no fresh
start is refused. A training that changed the factors by less goes unnoticed."""


@torch.no_grad()
def is_start(layer: AdaptedLayer, init: str) -> bool:
    """Tell whether a layer's factors are still those of its start, by what that left of its weight, R = W - s B A.

    PiSSA's factors are singular vectors of W, so that Bᵀ R = 0 and R Aᵀ = 0; with `niter` only one of the two is exact
    in PEFT. OLoRA's B is orthonormal with Bᵀ W = A, so that Bᵀ R = (1 - s) A. The test misses a training of one factor
    alone that R does not depend on: either factor with `niter`, A of OLoRA with s = 1. CorDA and LoRA-GA are not
    tested.
    """
    A, B = layer.module.lora_A[layer.adapter].weight, layer.module.lora_B[layer.adapter].weight
    weight: Any = layer.module.get_base_layer().weight
    kind, s = init.lower(), layer.scaling
    if A.is_meta or not kind.startswith(("pissa", "olora")):
        return True
    if kind == "olora" and layer.module.fan_in_fan_out:  # PEFT takes W for its transpose, and its forward fails
        return True
    A, B, rest = A.float(), B.float(), transpose(weight, layer.module.fan_in_fan_out).float()
    # Rounding the factors or R to 16 bits leaves something as if drawn at random, hence the roots; TF32 rounds B A.
    of_left = ROUNDED * rest.norm() * B.norm() / len(rest) ** 0.5 + TF32 * s * (B.T @ B @ A).norm()
    of_right = ROUNDED * rest.norm() * A.norm() / rest.shape[1] ** 0.5 + TF32 * s * (B @ (A @ A.T)).norm()
    if kind == "olora":
        return bool((B.T @ rest - (1 - s) * A).norm() <= of_left + ROUNDED / 2 * abs(1 - s) * A.norm())
    is_left, is_right = bool((B.T @ rest).norm() <= of_left), bool((rest @ A.T).norm() <= of_right)
    return is_left and is_right if kind == "pissa" else is_left or is_right


def check_svd_start(layers: Sequence[AdaptedLayer], init: object) -> None:
    """Raise ValueError where start="svd" would discard a start of PEFT other than the default and the Gaussian one."""
    # On the meta device B has no values. B of PiSSA, and of an orthogonal start, is not zero.
    fresh = any(not layer.b.weight.is_meta and not layer.b.weight.any() for layer in layers)
    if fresh and isinstance(init, str) and init.lower() != "gaussian":
        raise UserError(f"start is 'svd', which would discard the adapter's {init!r} start; use start='lora'")


@torch.no_grad()
def start_svd(layer: AdaptedLayer, generator: torch.Generator) -> None:
    """Draw A, B ~ N(0, 0.02^2) with E = 0, as AdaLoRA; where B is not zero, take the singular triples of the update,
    which give the same function."""
    a, b = layer.a, layer.b
    if a.A.is_meta:
        return  # the meta device has shapes alone
    update = singular(a.A, b.weight, torch.float32) if b.weight.any() else None
    for parameter in (a.A, b.weight):  # 0.02: AdaLoRA's initial std
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    a.E.zero_()
    if update is not None:
        count = len(update.values)  # fewer than r where the layer is narrower; the others are new triples
        b.weight[:, :count], a.E[:count], a.A[:count] = update


@torch.no_grad()
def keep_start(layer: AdaptedLayer) -> None:
    """Record the current triples as the initial ones, and the current base weight as the one that the start left."""
    A, E, B = (factor.detach() for factor in layer.factors)
    _begin(layer, E[:, None] * A, B.clone())


def _begin(layer: AdaptedLayer, A: Tensor, B: Tensor) -> None:
    layer.a.origin, layer.b.origin = A, B
    layer.a.start = layer.b.start = Start(A, layer.scaling * B)


@torch.no_grad()
def set_origin(layer: AdaptedLayer, A: Tensor, B: Tensor) -> None:
    """Set the initial values of the layer's triples, A `(r, in)` with E in it and B `(out, r)`, and add those of
    triples that are gone to the base weight, in place. A layer without a recorded start is left as it is."""
    a, b, start = layer.a, layer.b, layer.a.start
    if start is None or a.origin is None or b.origin is None:
        return
    weight, fan_in_fan_out = layer.module.get_base_layer().weight, layer.module.fan_in_fan_out
    A, B, dtype = A.to(a.A), B.to(a.A), torch.promote_types(weight.dtype, torch.float32)
    old = _product(layer.scaling * b.origin, a.origin, dtype)
    new = _product(layer.scaling * B, A, dtype)
    a.origin, b.origin = A, B
    if torch.equal(old, new):
        return
    beside = start.weight = weight.detach().to("cpu", copy=True) if start.weight is None else start.weight
    back = transpose(_product(start.B.to(new.device), start.A.to(new.device), dtype) - new, fan_in_fan_out)
    weight.copy_(beside.to(weight.device, dtype) + back)


def _product(B: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply B A over the triples that are not zero, so that triples added later do not change the rounding."""
    nonzero = A.any(1) & B.any(0)
    return B[:, nonzero].to(dtype) @ A[nonzero].to(dtype)


@torch.no_grad()
def follow(layer: AdaptedLayer, indices: Tensor, num_new: int) -> None:
    """Carry the initial values through a change of rank: the triples `indices` keep theirs, and those of the last
    `num_new` are A with B = 0."""
    a, b = layer.a, layer.b
    if a.origin is None or b.origin is None:
        return
    A, B = a.weight.detach()[len(a.A) - num_new :], b.origin.new_zeros(len(b.origin), num_new)
    set_origin(layer, torch.cat([a.origin[indices], A]), torch.cat([b.origin[:, indices], B], 1))


@torch.no_grad()
def follow_loaded(layer: AdaptedLayer, weight_too: bool) -> None:
    """Adjust the base weight to the initial triples of a loaded state dict; with `weight_too` that had the base weight
    too, so that only the record changes. Raises torch's RuntimeError: they are none of this model's start."""
    A, B, start = layer.a.loaded_origin, layer.b.loaded_origin, layer.a.start
    layer.a.loaded_origin = layer.b.loaded_origin = None
    if A is None or B is None or start is None or A.shape[0] != B.shape[1]:
        return
    A, B = A.to(layer.a.A), B.to(layer.a.A)
    if weight_too:
        return _begin(layer, A, B)
    # A subset of the start's triples, or another basis of it, lies in their span; triples added later are zero here.
    part = _product(B, A, torch.float32)
    left_factor, right_factor = start.B.to(part), start.A.to(part)
    within = left_factor @ (torch.linalg.pinv(left_factor) @ part @ torch.linalg.pinv(right_factor)) @ right_factor
    if (within - part).norm() > max(1e-3, 4 * torch.finfo(A.dtype).eps) * part.norm():
        raise RuntimeError(f"{layer.name}: {ANOTHER_START}")
    set_origin(layer, A, B)

"""`attach` puts triples inside PEFT's LoRA layers, and `detach` makes them ordinary LoRA again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from pedyra.errors import UserError
from pedyra.lora.factors import AFactor, BFactor, linear
from pedyra.lora.layer import AdaptedLayer, adapted_layers, holds_triples, peft_layers
from pedyra.lora.layer_names import rank_fields
from pedyra.lora.start import (
    check_start,
    check_svd_start,
    follow_loaded,
    keep_start,
    set_origin,
    start_svd,
    takes_from_weight,
)
from pedyra.lora.supported import check_supported, kind_of_module


def attach(model: nn.Module, adapter_name: str = "default", start: str = "lora", seed: int = 0) -> list[AdaptedLayer]:
    """Put triples into every LoRA layer of `model` that holds `adapter_name`; attaching twice changes nothing.

    With start="lora" (E = 1) this is an identity: same function, same Parameters A and B, same first update. With
    start="svd" a fresh adapter becomes A, B ~ N(0, 0.02^2), E = 0 (AdaLoRA), and one that already holds an update
    (PiSSA) is re-factored exactly into its singular triples. `seed` feeds the Gaussian draws.

    Returns the adapted layers, in the model's order.

    Raises:
        ValueError: no such adapter, a layer that cannot hold triples (embedding, convolution, MoE parameter), a start
            such as PiSSA on a quantised weight, or start="svd" for triples of the other start.
    """
    if isinstance(getattr(model, "module", None), PeftModel):  # DistributedDataParallel, DataParallel
        raise UserError(f"the model is inside a {type(model).__name__}; give the PEFT model itself, its .module")
    layers = list(peft_layers(model, adapter_name))
    if not layers:
        raise UserError(
            f"the model has no LoRA adapter named {adapter_name!r}; wrap it with "
            f"peft.get_peft_model(model, LoraConfig(...)) first, or pass the adapter's name"
        )
    if all(holds_triples(layer) for layer in layers):
        if start == "svd" and any(layer.a.e_fixed_at_one for layer in layers):
            raise UserError(
                f"adapter {adapter_name!r} holds triples with E = 1 already, and a method that trains E begins them "
                f"anew; call pedyra.detach(model, {adapter_name!r}) first, or give the method start='lora'"
            )
        return layers
    config: Any = model.peft_config[adapter_name]  # type: ignore[index]
    init: Any = getattr(config, "init_lora_weights", True)
    kinds = {layer.name: kind for layer in layers if (kind := kind_of_module(layer.module, adapter_name))}
    check_supported("adapt", f"adapter {adapter_name!r}", vars(config), kinds)
    if merged := [layer.name for layer in layers if adapter_name in layer.module.merged_adapters]:
        raise UserError(f"adapter {adapter_name!r} is merged into {merged[0]}; call model.unmerge_adapter() first")
    check_unsharded(layers)
    if takes_from_weight(init):
        check_start(model, layers, init)
    if start == "svd":
        check_svd_start(layers, init)
    # The config in the model will carry this run's ranks, so it is a copy: the user may reuse the object.
    model.peft_config[adapter_name] = copy.deepcopy(config)  # type: ignore[index]
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        _attach_layer(layer)
        if start == "svd":
            start_svd(layer, generator)
        if takes_from_weight(init):
            keep_start(layer)
    write_ranks(model, adapter_name)
    _watch_loading(model)
    return layers


def check_unsharded(layers: Sequence[AdaptedLayer]) -> None:
    """Refuse factors that are sharded (DTensors); the base may be, by FSDP2 or tensor parallelism."""
    for layer in layers:
        for slot in ("lora_A", "lora_B"):
            if any(hasattr(each, "placements") for each in getattr(layer.module, slot)[layer.adapter].parameters()):
                raise UserError(
                    f"{slot} of {layer.name} is sharded, and ranks cannot move across shards; leave the trained "
                    f"parameters out: fully_shard(..., ignored_params=), or no tensor parallel plan for this layer"
                )


def train_e(layers: Iterable[AdaptedLayer], on: bool) -> None:
    """Train E where A is trained, or never: then E is folded into A, the function stays the same, and the triples learn
    as a plain LoRA of the same ranks."""
    for layer in layers:
        layer.a.train_e(on)
        if not on and not layer.a.E.is_meta and not (layer.a.E == 1).all():
            with torch.no_grad():
                layer.a.A.mul_(layer.a.E[:, None])
                layer.a.E.fill_(1)
        layer.a.e_fixed_at_one = not on


def _ranks_as_loaded(model: nn.Module, incompatible_keys: Any) -> None:
    """Bring PEFT's config, which is saved beside the weights, in line with the ranks of a loaded state dict."""
    suffix = ".base_layer.weight"
    keys = (key for key in incompatible_keys.missing_keys if key.endswith(suffix))
    without = {key.removesuffix(suffix).removeprefix("base_model.model.") for key in keys}
    for name in getattr(model, "peft_config", {}):
        layers = adapted_layers(model, name)
        for layer in layers:
            follow_loaded(layer, weight_too=layer.name not in without)
        if any(layer.module.r[name] != max(1, layer.rank) for layer in layers):
            write_ranks(model, name)


def _watch_loading(model: nn.Module) -> None:
    """Register `_ranks_as_loaded` while an adapter holds triples, and remove it afterwards."""
    hooks = model._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _ranks_as_loaded]:
        del hooks[key]
    if any(adapted_layers(model, name) for name in getattr(model, "peft_config", {})):
        model.register_load_state_dict_post_hook(_ranks_as_loaded)


def detach(model: nn.Module, adapter_name: str = "default") -> None:
    """Undo `attach`: the slots become ordinary `nn.Linear` with E folded into A, and the function stays the same.

    The slots then hold what is saved: a layer of rank 0 has one row of zeros. Where PEFT's start took a part of the
    base weight (PiSSA), the weight is restored, and the factors contain the start. All are new Parameters.

    Raises:
        ValueError: nothing is attached under this name.
    """
    layers = adapted_layers(model, adapter_name)
    if not layers:
        raise UserError(f"no triples are attached to adapter {adapter_name!r}; there is nothing to detach")
    for layer in layers:
        _detach_layer(layer)
    _watch_loading(model)


def write_ranks(model: nn.Module, adapter_name: str = "default") -> None:
    """Bring the live PEFT config, and each layer's scaling, `r` and `lora_alpha`, in line with the ranks. Rank 0 counts
    as the one row of zeros that is saved."""
    config: Any = model.peft_config[adapter_name]  # type: ignore[index]
    sizes = {}
    for layer in adapted_layers(model, adapter_name):
        if layer.a.doubling is not None:
            layer.rescale(layer.a.doubling[1] * layer.share_at(layer.rank))
        sizes[layer.name] = max(1, layer.rank if layer.a.origin is None else 2 * layer.rank), layer.scaling
        layer.module.r[adapter_name] = max(1, layer.rank)
        layer.module.lora_alpha[adapter_name] = layer.scaling * max(1, layer.rank)
        layer.module.use_rslora[adapter_name] = False
    for field, value in rank_fields(sizes).items():
        setattr(config, field, value)


def _attach_layer(layer: AdaptedLayer) -> None:
    linear_A, linear_B = layer.module.lora_A[layer.adapter], layer.module.lora_B[layer.adapter]
    A, B = linear_A.weight, linear_B.weight  # the same Parameters, because an optimizer may hold them
    E = nn.Parameter(torch.ones(A.shape[0], dtype=A.dtype, device=A.device), requires_grad=A.requires_grad)
    layer.module.lora_A[layer.adapter] = AFactor(A, E).train(linear_A.training)
    layer.module.lora_B[layer.adapter] = BFactor(B, linear_B.bias).train(linear_B.training)


@torch.no_grad()
def _detach_layer(layer: AdaptedLayer) -> None:
    a, b, module, adapter = layer.a, layer.b, layer.module, layer.adapter
    flags = ((a, a.A.requires_grad), (b, b.weight.requires_grad))
    on_disk = [nn.Parameter(factor.state_dict()["weight"], requires_grad=trains) for factor, trains in flags]
    set_origin(layer, a.A[:0], b.weight[:, :0])
    for slots, factor, weight in zip((module.lora_A, module.lora_B), (a, b), on_disk, strict=True):
        slots[adapter] = linear(weight, factor.bias).train(factor.training)
    module.r[adapter] = module.lora_A[adapter].out_features
    module.lora_alpha[adapter] = layer.scaling * module.r[adapter]

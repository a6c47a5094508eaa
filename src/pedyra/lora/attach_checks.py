"""Which LoRA adapters can hold triples; everything else is refused by name before a slot is touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftType
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch import nn

if TYPE_CHECKING:
    from pedyra.lora.attach import AdaptedLayer


def check_supported(config: PeftConfig, layers: Sequence[AdaptedLayer]) -> None:
    """Refuse what cannot hold triples.

    Raises:
        ValueError: naming the layer and what to leave out.
    """
    if config.peft_type != PeftType.LORA:
        raise ValueError(f"the adapter is of type {config.peft_type}; triples go into LoRA adapters (peft.LoraConfig)")
    if getattr(config, "init_lora_weights", True) == "loftq":
        raise ValueError(
            "init_lora_weights is 'loftq', which replaces the base weights by quantised ones that no adapter file can "
            "hold; quantise the base (nf4) and use the default start"
        )
    for layer in layers:
        slots, kind = layer.module.lora_A, type(layer.module).__name__
        if kind == "MultiheadAttention":  # PEFT's merges the slots' weights and never calls them
            raise ValueError(
                f"{layer.name} is a torch.nn.MultiheadAttention, in which PEFT calls no LoRA slot, so nothing could be "
                f"measured there; leave it out with "
                f"LoraConfig(exclude_modules=[{layer.name!r}, {layer.name + '.out_proj'!r}])"
            )
        if kind == "ParamWrapper":
            raise ValueError(
                f"{layer.name} holds a LoRA of a parameter (LoraConfig(target_parameters=...), which PEFT fills in by "
                f"itself for the experts of some models), which cannot hold triples; only linear layers can: leave "
                f"target_parameters out, and name the linear layers, e.g. target_modules=['q_proj', 'v_proj']"
            )
        if layer.adapter not in slots or type(slots[layer.adapter]) is not nn.Linear:
            raise ValueError(
                f"{layer.name} is a LoRA layer of kind {kind}, which cannot hold triples; only linear layers can: "
                f"leave it out with LoraConfig(exclude_modules=[{layer.name!r}])"
            )
        variant = getattr(layer.module, "lora_variant", {}).get(layer.adapter)
        if variant is not None and "Dora" not in type(variant).__name__:
            raise ValueError(
                f"{layer.name} uses {type(variant).__name__}, which knows no changing ranks; plain LoRA and DoRA do"
            )
        if layer.adapter in layer.module.merged_adapters:
            raise ValueError(
                f"adapter {layer.adapter!r} is merged into {layer.name}; call model.unmerge_adapter() first"
            )


def check_no_head(model: nn.Module, layers: Sequence[AdaptedLayer], init: str) -> None:
    """Refuse a start that rewrites the weight of an adapted head that PEFT saves beside the adapter.

    It does where one of its `EMBEDDING_LAYER_NAMES` is adapted; what we save is relative to the pristine weight.

    Raises:
        ValueError: naming the layer.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not any(layer.name.split(".")[-1] in EMBEDDING_LAYER_NAMES for layer in layers):
        return
    for layer in layers:
        if any(layer.module is end for end in ends(base)):
            raise ValueError(
                f"the {init!r} start rewrites the weight of {layer.name}, which PEFT saves with the adapter, so that "
                f"it could not be loaded again; leave it out with LoraConfig(exclude_modules=[{layer.name!r}]), or use "
                f"the default start"
            )


def check_svd_start(layers: Sequence[AdaptedLayer], init: object) -> None:
    """Refuse to discard a start that is no plain one; ValueError."""
    fresh = not all(layer.module.lora_B[layer.adapter].weight.any() for layer in layers)
    if fresh and isinstance(init, str) and init != "gaussian":
        raise ValueError(
            f"rank.start is 'svd', which would discard the adapter's {init!r} start; use rank.start='lora' to keep it"
        )


def ends(base: nn.Module) -> tuple[Any, Any]:
    """The input embeddings and the output layer of a transformers model; None for what it does not have."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(base, name)())
        except (AttributeError, NotImplementedError):  # no transformers model, or one of a kind of its own
            found.append(None)
    return found[0], found[1]

"""A base model with the recipe's LoRA around it."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed

from pedyra.models import layer_ranks, lora_config
from pedyra.recipe import Recipe


def with_lora(base_model: PreTrainedModel, recipe: Recipe, **changes: Any) -> PeftModel:
    """The base model with `recipe.lora`, some of its fields changed (e.g. r=12).

    Raises:
        ValueError: PiSSA's start on a quantised model; `lora.ranks` with an unknown layer; an unknown start.
    """
    section = recipe.lora.model_copy(update=changes)
    if str(section.init).startswith("pissa") and recipe.model.quantization != "none":
        raise ValueError(
            f"model.quantization is {recipe.model.quantization!r}, but PiSSA decomposes the weight before it is "
            f"quantised and rewrites it; use none, or another lora.init (method pissa: method qlora)"
        )
    config = lora_config(section, recipe.data.kind, layer_ranks(base_model, section.ranks))
    try:
        return with_adapter(base_model, config, recipe.seed)
    except ValueError as error:
        if "init_lora_weights" not in str(error):
            raise
        raise ValueError(
            f"lora.init is {section.init!r}, which PEFT does not take ({error}); use true, or a start that it knows, "
            f"e.g. gaussian, pissa, olora, orthogonal"
        ) from error


def with_adapter(base_model: PreTrainedModel, config: PeftConfig, seed: int) -> PeftModel:
    """The base model with the adapter of `config`, drawn with `seed`, which the global seeds are set to."""
    set_seed(seed)
    model = get_peft_model(base_model, config)
    assert isinstance(model, PeftModel)
    return model

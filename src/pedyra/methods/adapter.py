"""A base model with the LoRA of a request around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import set_seed

from pedyra.allocate.contract import RankMethod
from pedyra.lora.attach import attach, train_e
from pedyra.lora.layer_names import pattern_keys
from pedyra.methods.method import Adaptation, Request, changed


def is_quantised(model: nn.Module) -> bool:
    """Whether the frozen weights are in 4 or 8 bits, as transformers marks its models."""
    return bool(getattr(model, "is_quantized", False))


def with_ranks(lora: LoraConfig, ranks: Mapping[str, int], alphas: Mapping[str, float] | None = None) -> LoraConfig:
    """A copy with a rank per layer (full name), and an alpha per layer where it is not `lora_alpha`."""
    keys = pattern_keys(ranks)
    patterns: dict[str, Any] = {"rank_pattern": {keys[name]: rank for name, rank in ranks.items()}}
    if alphas is not None:
        patterns["alpha_pattern"] = {keys[name]: alpha for name, alpha in alphas.items()}
    return changed(lora, **patterns)


def with_lora(request: Request, **changes: Any) -> PeftModel:
    """The base model with the request's LoRA, some of its fields changed (e.g. r=12).

    Raises:
        ValueError: PiSSA's start on a quantised model; an unknown start.
    """
    config = changed(request.lora, **changes)
    init = config.init_lora_weights
    if str(init).startswith("pissa") and is_quantised(request.model):
        raise ValueError(
            "the base model is quantised, but PiSSA decomposes the weight before it is quantised and rewrites it; set "
            "model.quantization to none, or use another lora.init (method pissa: method qlora)"
        )
    try:
        return with_adapter(request.model, config, request.seed)
    except ValueError as error:
        if "init_lora_weights" not in str(error):
            raise
        raise ValueError(
            f"lora.init is {init!r}, which PEFT does not take ({error}); use true, or a start that it knows, "
            f"e.g. gaussian, pissa, olora, orthogonal"
        ) from error


def with_adapter(base_model: nn.Module, config: PeftConfig, seed: int) -> PeftModel:
    """The base model with the adapter of `config`, drawn with `seed`, which the global seeds are set to."""
    set_seed(seed)
    model = get_peft_model(base_model, config)  # type: ignore[arg-type]
    assert isinstance(model, PeftModel)
    return model


def adaptive(model: PeftModel, method: RankMethod, **more: Any) -> Adaptation:
    """The Adaptation of a method that moves ranks, with its triples attached; `more` are further fields."""
    train_e(attach(model, start=method.start, seed=method.seed), method.trains_e)
    return Adaptation(model=model, ranks=method, **more)

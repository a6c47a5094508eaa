"""Frozen weights in 4 or 8 bits through bitsandbytes: the only file that needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig


def quantization_config(
    quantization: str, compute_dtype: torch.dtype, heads: list[str] | None = None
) -> BitsAndBytesConfig:
    """QLoRA's setting for nf4 (double quantisation), LLM.int8 for int8; `heads` are modules to leave as they are.

    transformers leaves a language model's head alone by itself (None), but not every new classification head.

    Raises ImportError with the line that installs bitsandbytes.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ImportError(
            f'model.quantization {quantization} needs bitsandbytes; run in a checkout: pip install ".[quant]"'
        ) from None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=heads,  # used for 4 bits too
    )


def keep_weight_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with AVX-512 at the first evaluation.

    The repacked layout computes slightly different numbers, cannot be dequantised, and breaks the training steps that
    follow the evaluation. Elsewhere this changes nothing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def quantise_linears(model: nn.Module, names: Sequence[str]) -> None:
    """Put nf4 weights in the place of these nn.Linear, for a model that transformers did not load; in place."""
    bnb: Any
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise ImportError('weights in 4 bits need bitsandbytes; run in a checkout: pip install ".[quant]"') from None
    for name in names:
        parent, _, last = name.rpartition(".")
        linear: Any = model.get_submodule(name)
        bias = linear.bias is not None
        packed: Any = bnb.nn.LinearNF4(linear.in_features, linear.out_features, bias)
        packed.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
        packed.bias = linear.bias
        setattr(model.get_submodule(parent), last, packed.to(linear.weight.device))
    keep_weight_layout(model)
    model.is_loaded_in_4bit = model.is_quantized = True  # type: ignore[assignment]

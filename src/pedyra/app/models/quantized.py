"""Frozen weights are loaded in 4 or 8 bits by bitsandbytes, which only this file needs."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from pedyra.app.packaged import import_extra


def quantization_config(
    quantization: str, compute_dtype: torch.dtype, heads: list[str] | None = None
) -> BitsAndBytesConfig:
    """Make QLoRA's setting for nf4 (double quantisation), LLM.int8 for int8; `heads` are modules to leave as they are:
    transformers leaves a language model's head alone by itself (None), but not every new classification head."""
    import_extra("bitsandbytes", f"model.quantization {quantization} needs bitsandbytes", "quant")
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
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with AVX-512 at the first evaluation: the repacked weights
    compute slightly other numbers, cannot be dequantised, and break the training steps after the evaluation."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]

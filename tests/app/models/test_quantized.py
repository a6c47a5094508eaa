"""Quantised bases load frozen and ready for an adapter; without bitsandbytes the repair is named."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from peft import get_peft_model

from pedyra.app.models.base import load_model, load_tokenizer
from pedyra.app.models.lora import lora_config
from pedyra.app.models.quantized import quantization_config
from pedyra.app.recipe_sections import LoraSection, ModelSection


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r'nf4 needs bitsandbytes; .*pip install "\.\[quant\]"'):
        quantization_config("nf4", torch.float32)


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_trains_its_adapter_alone(quantization: Any):
    bnb = pytest.importorskip("bitsandbytes")
    section = ModelSection(name="tiny-llama", quantization=quantization)
    base = load_model(section, "causal_lm", None, load_tokenizer(section), seed=0)
    kind = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}[quantization]
    assert type(base.get_submodule("model.layers.0.mlp.up_proj")) is kind
    model = get_peft_model(base, lora_config(LoraSection(r=2), "causal_lm", base))
    tokens = torch.arange(12).reshape(2, 6)
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient and all("lora_B" in name for name in with_gradient)  # B = 0, so A has no gradient yet

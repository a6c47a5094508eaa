"""What cannot hold triples is refused before anything is changed, with the layer's name and the repair."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from pedyra.lora.attach import attach
from pedyra.lora.layer import adapted_layers


def linear(config: Any = None) -> Any:
    """A linear layer, with an adapter where there is a config."""
    base: Any = nn.Sequential(nn.Linear(6, 6))
    return base if config is None else get_peft_model(base, config)


def merged() -> Any:
    model = linear(LoraConfig(target_modules=["0"]))
    model.merge_adapter()
    return model


REFUSED: dict[str, tuple[Any, str, str]] = {
    "another type": (lambda: linear(LoHaConfig(target_modules=["0"])), "default", "no LoRA adapter named 'default'"),
    "none": (linear, "default", "no LoRA adapter named 'default'"),
    "misspelt": (lambda: linear(LoraConfig(target_modules=["0"])), "typo", "no LoRA adapter named 'typo'"),
    "merged": (merged, "default", "is merged into 0; call model.unmerge_adapter"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_holds_no_adapter_of_this_name_is_refused(case: str):
    make, name, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        attach(make(), name)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_rewrites_a_head_is_refused(start, make_llama):
    """PEFT saves the rewritten head with the adapter, to which factors against the pristine one do not belong."""
    model = make_llama(init_lora_weights=start, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"lm_head.*exclude_modules=\['lm_head'\]"):
        attach(model)
    assert adapted_layers(model) == []
    assert len(attach(make_llama(target_modules=["q_proj", "lm_head"]))) == 3  # a plain start is none of that


def test_a_head_that_peft_does_not_save_may_be_rewritten():
    config = BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    settings = LoraConfig(r=3, target_modules=["query", "decoder"], init_lora_weights="pissa")
    assert len(attach(get_peft_model(BertForMaskedLM(config), settings))) == 2  # type: ignore[arg-type]

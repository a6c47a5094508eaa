"""all-linear adapts every linear of an encoder, a decoder and the attention between them, and no head."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from pedyra.app.models import load_model, load_tokenizer, lora_config
from pedyra.app.recipe_sections import LoraSection, ModelSection


@pytest.mark.parametrize(
    ("name", "kind", "head"),
    [
        ("tiny-bart", "seq2seq", "lm_head"),
        ("tiny-t5", "seq2seq", "lm_head"),
        ("tiny-deberta", "question_answering", "qa_outputs"),
        ("tiny-deberta", "classification", "classifier"),
    ],
)
def test_all_linear_is_all_but_the_head(name: str, kind: str, head: str):
    section = ModelSection(name=name)
    base = load_model(section, kind, 2, load_tokenizer(section), seed=0)
    linear = {path for path, module in base.named_modules() if isinstance(module, nn.Linear)}
    assert head in linear
    model = get_peft_model(base, lora_config(LoraSection(r=2), kind))
    adapted = {
        path.removeprefix("base_model.model.")
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert linear - adapted == {head}
    trained = {path for path, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in path}
    assert all(head in path for path in trained) and bool(trained) == (kind != "seq2seq")

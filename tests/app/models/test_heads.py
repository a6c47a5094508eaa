"""all-linear adapts every linear of an encoder, a decoder and the attention between them, and no head."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, DistilBertConfig, XLMConfig, XLNetConfig

from pedyra.app.models.base import load_model, load_tokenizer
from pedyra.app.models.lora import check_random_weights, lora_config
from pedyra.app.recipe_sections import LoraSection, ModelSection
from pedyra.export.loading import num_labels
from pedyra.lora.folder import read_lora


@pytest.mark.parametrize(
    ("name", "kind", "heads"),
    [
        ("tiny-llama", "causal_lm", {"lm_head"}),
        ("tiny-bart", "seq2seq", {"lm_head"}),
        ("tiny-t5", "seq2seq", {"lm_head"}),
        ("tiny-deberta", "question_answering", {"qa_outputs"}),
        ("tiny-deberta", "classification", {"classifier", "pooler.dense"}),
        ("tiny-bart", "classification", {"classification_head.dense", "classification_head.out_proj"}),
        ("tiny-bert", "regression", {"classifier"}),
    ],
)
def test_all_linear_is_all_but_the_head(name: str, kind: str, heads: set[str]):
    section = ModelSection(name=name)
    base = load_model(section, kind, 2, load_tokenizer(section), seed=0)
    linear = {path for path, module in base.named_modules() if isinstance(module, nn.Linear)}
    assert heads <= linear
    model = get_peft_model(base, lora_config(LoraSection(r=2), kind, base))
    adapted = {
        path.removeprefix("base_model.model.")
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert linear - adapted == heads
    trained = {path for path, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in path}
    tops = {head.partition(".")[0] for head in heads}
    assert {path.split(".")[2] for path in trained} == (set() if kind in ("causal_lm", "seq2seq") else tops)


@pytest.mark.parametrize("name", ["tiny-deberta", "tiny-bart", "tiny-bert"])
def test_an_adapter_brings_its_heads_whatever_the_base_has_drawn_for_them(name: str, tmp_path: Path):
    section = ModelSection(name=name)
    tokenizer = load_tokenizer(section)
    first, second = (load_model(section, "classification", 3, tokenizer, seed=seed) for seed in (0, 1))
    body = first.base_model_prefix
    second.get_submodule(body).load_state_dict(first.get_submodule(body).state_dict())  # of one checkpoint
    batch = tokenizer(["a good plot", "bad"], return_tensors="pt", padding=True)
    model = get_peft_model(first, lora_config(LoraSection(r=2, init="gaussian"), "classification", first)).eval()
    model.save_pretrained(str(tmp_path))
    assert num_labels(read_lora(tmp_path)) == 3
    loaded = PeftModel.from_pretrained(second, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_a_weight_that_the_checkpoint_lacks_is_trained_in_full_or_refused(tmp_path: Path):
    tiny = ModelSection(name="tiny-bert")
    made: Any = load_model(tiny, "classification", 2, load_tokenizer(tiny), seed=0)
    made.bert.save_pretrained(tmp_path / "whole")
    load_tokenizer(tiny).save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "headless")
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "pooler" not in name}
    save_file(kept, tmp_path / "headless" / "model.safetensors", {"format": "pt"})
    for folder, lacks in (("whole", False), ("headless", True)):
        section = ModelSection(name=str(tmp_path / folder))
        base = load_model(section, "classification", 2, load_tokenizer(section), seed=0)
        for trained in (None, ["pooler"]):
            config = lora_config(LoraSection(r=2, modules_to_save=trained), "classification", base)
            if lacks and not trained:
                with pytest.raises(
                    ValueError, match=r"no bert.pooler.dense.bias, .*modules_to_save=\[bert.pooler.dense\]"
                ):
                    check_random_weights(base, config, section.name)
            else:
                check_random_weights(base, config, section.name)


THREE: dict[str, Any] = {"vocab_size": 60, "num_labels": 3}
SMALL: dict[str, Any] = {**THREE, "n_layers": 1, "n_heads": 2}


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (DistilBertConfig(**SMALL, dim=16, hidden_dim=32), {"pre_classifier", "classifier"}),
        (XLMConfig(**SMALL, emb_dim=16), {"sequence_summary"}),
        (
            XLNetConfig(**THREE, d_model=16, n_layer=1, n_head=2, d_inner=32),
            {"sequence_summary", "logits_proj"},
        ),
    ],
)
def test_heads_of_several_parts_are_trained_whole(config: Any, heads: set[str], tmp_path: Path):
    base = AutoModelForSequenceClassification.from_config(config)
    model = get_peft_model(base, lora_config(LoraSection(r=2), "classification", base))
    trained = {path for path, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in path}
    assert {path.split(".")[2] for path in trained} == heads
    model.save_pretrained(str(tmp_path))
    assert num_labels(read_lora(tmp_path)) == 3


def test_layers_of_another_rank_keep_the_scaling_of_r():
    config = lora_config(LoraSection(r=4, alpha=8, rank_pattern={"0": 6}), "causal_lm", nn.Module())
    config.target_modules, config.task_type = {"0", "1"}, None  # type: ignore[assignment]
    layers: Any = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config).base_model.model
    assert [(layer.r["default"], layer.scaling["default"]) for layer in layers] == [(6, 2.0), (4, 2.0)]

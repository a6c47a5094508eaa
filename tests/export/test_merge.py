"""Merged weights: the logits of the adapted model, from a live model or a folder; the base's own dtype."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from closeness import same_bits
from peft import LoraConfig, get_peft_model
from test_export import FLAVOURS, logits, mixed_ranks
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    ViTConfig,
    ViTForImageClassification,
)

from pedyra import export_adapter
from pedyra.app.models.tiny import tiny_tokenizer
from pedyra.export.merge import merge_into
from pedyra.lora.folder import saved_lora


def load_merged(folder: Path, auto: Any = AutoModelForCausalLM) -> Any:
    assert (folder / "model.safetensors").is_file() and not (folder / "adapter_config.json").exists()
    return auto.from_pretrained(folder)


@pytest.fixture
def based(tmp_path) -> Any:
    """based(model, base): the model, whose adapter names the folder that the base was saved to."""

    def make(model: Any, base: Any) -> Any:
        base.save_pretrained(tmp_path / "base")
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        return model

    return make


@pytest.mark.parametrize("flavour", list(FLAVOURS))
def test_the_merged_weights_give_the_logits_of_the_adapted_model(flavour, make_llama, based, tokens, tmp_path):
    model = based(mixed_ranks(make_llama(**FLAVOURS[flavour])), make_llama().unload())
    tiny_tokenizer("tiny-llama").save_pretrained(tmp_path / "base")
    expected, before = logits(model, tokens), {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path / "adapter")
    for source in (model, tmp_path / "adapter"):
        folder = export_adapter(source, "merged", tmp_path / f"out{source is model}")
        assert torch.allclose(logits(load_merged(folder), tokens), expected, atol=1e-5)
        own = tiny_tokenizer("tiny-llama")("ab")["input_ids"]
        assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == own
        assert json.loads((folder / "pedyra_export.json").read_text())["tokenizer"] is True
    after = model.state_dict()
    assert before.keys() == after.keys() and all(same_bits(before[key], after[key]) for key in before)


def test_a_classifier_keeps_its_trained_head(make_bert, based, tokens, tmp_path):
    model = based(mixed_ranks(make_bert()), make_bert().unload().bert)  # a base without a head
    merged = load_merged(export_adapter(model, "merged", tmp_path / "out"), AutoModelForSequenceClassification)
    assert torch.allclose(logits(merged, tokens), logits(model, tokens), atol=1e-5)


@pytest.mark.parametrize("trained", [{}, {"trainable_token_indices": {"embed_tokens": [40, 41]}}])
def test_a_vocabulary_that_was_resized_is_that_of_the_merged_model(trained, make_llama, based, tokens, tmp_path):
    """As TRL has it where a chat template brings tokens of its own. The tokenizer of the base lacks them."""
    base = make_llama().unload()
    base.resize_token_embeddings(base.config.vocab_size + 2)
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **trained)  # type: ignore[arg-type]
    model: Any = based(get_peft_model(base, lora), make_llama().unload())
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += 1
    tiny_tokenizer("tiny-llama").save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokens["input_ids"][:, 2] = 41
    with pytest.warns(UserWarning, match="resized the vocabulary from 40 tokens to 42"):
        out = export_adapter(tmp_path / "adapter", "merged", tmp_path / "merged")
    merged = load_merged(out)
    assert merged.config.vocab_size == base.config.vocab_size
    assert torch.allclose(logits(merged, tokens), logits(model, tokens), atol=1e-5)
    assert json.loads((out / "pedyra_export.json").read_text())["tokenizer"] is False


def test_a_model_of_images_which_has_no_vocabulary_is_merged(based, tmp_path):
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    base = ViTForImageClassification(ViTConfig(**shape, image_size=8, patch_size=4))
    lora = LoraConfig(target_modules="all-linear", exclude_modules=["classifier"], init_lora_weights=False)
    model = based(get_peft_model(copy.deepcopy(base), lora), base)  # type: ignore[arg-type]
    merged = load_merged(export_adapter(model, "merged", tmp_path / "out"), ViTForImageClassification)
    pixels = torch.linspace(0, 1, 192).reshape(1, 3, 8, 8)
    assert torch.allclose(merged(pixels).logits, model.eval()(pixels).logits, atol=1e-5)


def test_the_dtype_of_the_base_is_kept(make_llama, tmp_path):
    make_llama().unload().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    mixed_ranks(make_llama()).save_pretrained(tmp_path / "adapter")
    folder = export_adapter(tmp_path / "adapter", "merged", tmp_path / "out", base=tmp_path / "base")
    assert json.loads((folder / "pedyra_export.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(folder, dtype="auto").parameters()} == {
        torch.bfloat16
    }


def test_a_base_is_of_the_revision_that_its_adapter_names(make_llama, tmp_path, monkeypatch):
    make_llama().unload().save_pretrained(tmp_path / "base")
    model = make_llama(revision="v1")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    asked: list[str] = []
    load = AutoModelForCausalLM.from_pretrained

    def spy(name: str, **options: Any) -> Any:
        asked.append(options["revision"])
        return load(name, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    export_adapter(tmp_path / "adapter", "merged", tmp_path / "out")
    export_adapter(tmp_path / "adapter", "merged", tmp_path / "other", base=tmp_path / "base")
    assert asked == ["v1", "main"]


SIZES: dict[str, Any] = dict(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1)
SIZES |= dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)


def bart() -> Any:
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**SIZES))


def bert_mlm() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))


TIED = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
UNTIED = pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")


@TIED
@UNTIED
@pytest.mark.parametrize(
    ("base", "head", "targets", "task"),
    [(bart, "lm_head", ["q_proj"], "SEQ_2_SEQ_LM"), (bert_mlm, "cls", ["query"], None)],
)
def test_a_trained_head_that_was_tied_leaves_no_other_weight_out_of_the_file(
    base, head, targets, task, based, tmp_path
):
    lora = LoraConfig(r=2, target_modules=targets, modules_to_save=[head], task_type=task)
    model: Any = based(get_peft_model(base(), lora), base())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    folder = export_adapter(model, "merged", tmp_path / "out")
    merged, ids = type(base()).from_pretrained(folder).eval(), torch.randint(3, 64, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("recipe", ["model: {name: tiny-bert}\ndata: {source: toy}\n", "quant_stage: {}\n"])
def test_a_recipe_beside_an_adapter_that_is_of_no_run_is_not_its_recipe(recipe, make_llama, tokens, tmp_path):
    model = mixed_ranks(make_llama())
    (tmp_path / "recipe.yaml").write_text(recipe)
    model.save_pretrained(tmp_path / "out")
    base = make_llama().unload()
    base.save_pretrained(tmp_path / "base")
    merged = export_adapter(tmp_path / "out", "merged", tmp_path / "merged", base=str(tmp_path / "base"))
    assert torch.allclose(logits(load_merged(merged), tokens), logits(model, tokens), atol=1e-5)


@pytest.mark.parametrize(
    ("task_type", "auto"), [("SEQ_CLS", "SequenceClassification"), ("TOKEN_CLS", "TokenClassification")]
)
def test_a_saved_head_takes_the_place_of_one_of_another_size(task_type, auto, tokens, tmp_path):
    config = BertConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    auto_class: Any = getattr(transformers, f"AutoModelFor{auto}")
    auto_class.from_config(config).save_pretrained(tmp_path / "base")  # a head of 2
    base = auto_class.from_pretrained(tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True)
    model = mixed_ranks(get_peft_model(base, LoraConfig(task_type=task_type, target_modules=["query", "value"])))
    model.save_pretrained(tmp_path / "adapter")
    merged = export_adapter(tmp_path / "adapter", "merged", tmp_path / "merged", base=str(tmp_path / "base"))
    loaded = auto_class.from_pretrained(merged).eval()
    with torch.no_grad():
        expected = model.eval()(**tokens).logits
        assert torch.allclose(loaded(**tokens).logits, expected, atol=1e-5) and expected.shape[-1] == 5


def of_bart(target: str) -> Any:
    lora = LoraConfig(r=2, target_modules=[target], task_type="SEQ_2_SEQ_LM")  # type: ignore[arg-type]
    return get_peft_model(bart(), lora), bart()


def tied(make: Any) -> tuple[Any, Any]:
    """A Llama whose head is its embeddings, with a LoRA on it."""
    base = make.llama().unload()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    return make.llama(target_modules=["q_proj", "lm_head"]), base


SHARE = "share one weight, which merging would change for both"
REFUSED: dict[str, tuple[Callable[[Any], tuple[Any, Any]], str]] = {
    "no base": (lambda m: (m.llama(), None), "does not name its base model .*; pass its name"),
    "fewer layers": (lambda m: (m.llama(), m.llama(blocks=1).unload()), r"no layer .*ers\.1"),
    "tied": (tied, SHARE),
    "twice": (
        lambda m: (m.llama(target_modules=["q_proj"], layer_replication=[[0, 1], [0, 1]]), m.llama().unload()),
        r"layers.0.self_attn.q_proj and .*layers.1.self_attn.q_proj share one weight",
    ),
    "shared": (lambda m: of_bart("shared"), SHARE),
    "bias": (lambda m: (m.llama(lora_bias=True), m.llama().unload()), "merged: .*lora_bias=True.*target peft"),
}


@TIED
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # of biases where the base has none
@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_merged_is_refused_in_one_line(case, make_llama, based, tmp_path):
    make, told = REFUSED[case]
    model, base = make(SimpleNamespace(llama=make_llama))
    model = model if base is None else based(model, base)
    with pytest.raises(ValueError, match=told) as refusal:
        export_adapter(model, "merged", tmp_path / "out")
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


def test_a_base_in_few_bits_is_not_merged_into(make_llama, based, tmp_path):
    """By the mark that transformers leaves on a model that it has loaded so."""
    model, base = based(make_llama(), make_llama().unload()), make_llama().unload()
    base.quantization_method = "nf4"
    with saved_lora(model) as lora, pytest.raises(ValueError, match="is quantised, .*name one that is loaded in float"):
        merge_into(base, lora)

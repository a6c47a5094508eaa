"""The lines that serve what an export has written."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, BertModel

from pedyra.app.export.export import export_adapter
from pedyra.app.export.serving import serving_lines, why_not_in_vllm
from pedyra.lora.folder import read_lora


@pytest.fixture
def llama(make_llama: Any, tmp_path: Path) -> Path:
    """A folder with the LoRA of a tiny Llama of ranks 3 and 9, whose base is in the folder `base` beside it."""
    model = make_llama(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 9})
    model.get_base_model().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("target", ["peft", "padded"])
def test_vllm_gets_a_rank_that_it_allows_and_peft_a_line_that_loads(llama: Path, tmp_path: Path, target: str):
    out = export_adapter(llama, target, tmp_path / "my export")
    vllm, peft = serving_lines(out, target)
    words = shlex.split(vllm)
    assert words[:3] == ["vllm", "serve", str(tmp_path / "base")]
    assert words[words.index("--max-lora-rank") + 1] == "16"  # the next above 9
    assert words[words.index("--lora-modules") + 1] == f"my export={out}"
    command = shlex.split(peft)
    assert command[:2] == ["python", "-c"]
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("task", ["SEQ_CLS", "FEATURE_EXTRACTION", None])
def test_peft_gets_a_line_that_loads_an_encoder(task: str | None, tmp_path: Path):
    """Without the number of labels PEFT makes a head of two."""
    config = BertConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    kind = BertModel if task == "FEATURE_EXTRACTION" else BertForSequenceClassification
    BertModel(config).save_pretrained(tmp_path / "base")
    config.num_labels = 3
    base = kind(config)
    heads = None if task else ["classifier"]
    lora = LoraConfig(r=2, target_modules=["query"], task_type=task, modules_to_save=heads)  # type: ignore[arg-type]
    model: Any = get_peft_model(base, lora)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    out = export_adapter(tmp_path / "adapter", "peft", tmp_path / "out")
    (line,) = serving_lines(out, "peft")
    done = subprocess.run([sys.executable, *shlex.split(line)[1:]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_vllm_loads_the_revision_that_the_adapter_names(make_llama: Any, tmp_path: Path):
    make_llama(revision="a b").save_pretrained(tmp_path / "adapter")
    out = export_adapter(tmp_path / "adapter", "peft", tmp_path / "out")
    words = shlex.split(serving_lines(out, "peft")[0])
    assert words[words.index("--revision") + 1] == "a b"


def test_llama_cpp_converts_and_then_serves(llama: Path, tmp_path: Path):
    out = export_adapter(llama, "gguf", tmp_path / "gguf")
    convert, server = (shlex.split(line) for line in serving_lines(out, "gguf"))
    assert convert[1:3] == ["convert_lora_to_gguf.py", str(out)]
    assert convert[convert.index("--outfile") + 1] == server[server.index("--lora") + 1]


@pytest.mark.parametrize("name", ["gpt2", "owner/base"])
def test_llama_cpp_gets_a_base_on_the_hub_by_the_option_for_one(llama: Path, tmp_path: Path, name: str):
    config = json.loads((llama / "adapter_config.json").read_text())
    (llama / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
    words = shlex.split(serving_lines(export_adapter(llama, "gguf", tmp_path / "gguf"), "gguf")[0])
    assert words[words.index("--base-model-id") + 1] == name and "--base" not in words


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # of biases where the base has none
@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("bias", "all", "biases"),
        ("lora_bias", True, "biases"),
        ("trainable_token_indices", [1], "trained tokens"),
        ("use_dora", True, "DoRA"),
    ],
)
def test_what_is_no_factor_is_refused_by_vllm(make_llama: Any, tmp_path: Path, field: str, value: Any, kind: str):
    out = export_adapter(make_llama(**{field: value}), "peft", tmp_path / "out")
    assert json.loads((out / "pedyra_export.json").read_text())["vllm"]["refused_for"] == [kind]
    assert not any("vllm" in line for line in serving_lines(out, "peft"))


def test_an_embedding_of_a_resized_vocabulary_is_refused_by_vllm(make_llama: Any, tmp_path: Path):
    make_llama().save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    out = export_adapter(tmp_path / "adapter", "peft", tmp_path / "out")
    (refused,) = json.loads((out / "pedyra_export.json").read_text())["vllm"]["refused_for"]
    assert refused.endswith(("lm_head.weight", "embed_tokens.weight"))
    assert not any("vllm" in line for line in serving_lines(out, "peft"))


def test_a_merged_language_model_is_served_without_an_adapter(llama: Path, tmp_path: Path):
    out = export_adapter(llama, "merged", tmp_path / "merged")
    assert serving_lines(out, "merged") == [f"vllm serve {out}"]


def test_what_vllm_refuses_has_no_line_for_it(make_bert: Any, tmp_path: Path):
    make_bert().save_pretrained(tmp_path / "adapter")
    out = export_adapter(tmp_path / "adapter", "peft", tmp_path / "out")
    (line,) = serving_lines(out, "peft")
    assert "AutoPeftModelForSequenceClassification" in line


def test_several_scalings_are_not_served_by_vllm_until_they_are_made_one(make_llama: Any, tmp_path: Path):
    model = make_llama(target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 1.0})
    model.save_pretrained(tmp_path / "adapter")
    told = why_not_in_vllm(read_lora(tmp_path / "adapter"))
    assert told is not None and "2 scalings" in told
    assert why_not_in_vllm(read_lora(export_adapter(tmp_path / "adapter", "peft", tmp_path / "out"))) is None

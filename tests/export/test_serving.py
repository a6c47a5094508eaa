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

from pedyra.app.runs.served import serving_lines
from pedyra.export.export import export_adapter


@pytest.fixture
def llama(make_llama: Any, tmp_path: Path) -> Path:
    """A folder with the LoRA of a tiny Llama of ranks 3 and 9, whose base is in the folder `base` beside it."""
    model = make_llama(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 9})
    model.get_base_model().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("target", ["peft", "padded"])
def test_peft_gets_a_line_that_loads(llama: Path, tmp_path: Path, target: str):
    (line,) = serving_lines(export_adapter(llama, target, tmp_path / "my export"), target)
    done = subprocess.run([sys.executable, *shlex.split(line)[1:]], capture_output=True, text=True, timeout=300)
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
    "field", [{}, {"bias": "all"}, {"lora_bias": True}, {"trainable_token_indices": [1]}, {"use_dora": True}], ids=str
)
def test_the_record_names_the_fields_for_which_vllm_refuses_the_adapter(make_llama: Any, tmp_path: Path, field: Any):
    out = export_adapter(make_llama(**field), "peft", tmp_path / "out")
    assert json.loads((out / "pedyra_export.json").read_text())["vllm"]["refused_for"] == [*field]


def test_an_embedding_of_a_resized_vocabulary_is_refused_by_vllm(make_llama: Any, tmp_path: Path):
    make_llama().save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    out = export_adapter(tmp_path / "adapter", "peft", tmp_path / "out")
    assert json.loads((out / "pedyra_export.json").read_text())["vllm"]["refused_for"] == ["tensors"]


def test_a_merged_model_is_loaded_without_an_adapter(llama: Path, tmp_path: Path):
    out = export_adapter(llama, "merged", tmp_path / "it's merged")
    (line,) = serving_lines(out, "merged")
    *_, code = shlex.split(line)
    assert "from transformers import LlamaForCausalLM" in code and f'from_pretrained("{out}")' in code

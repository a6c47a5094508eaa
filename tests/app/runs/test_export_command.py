"""A run is merged into the model of its recipe: logits of the adapted model, its tokenizer and its template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pedyra.app.models.base import load_model, load_tokenizer
from pedyra.app.models.tiny import tiny_tokenizer
from pedyra.app.recipe import Recipe
from pedyra.app.runs.export import export_folder


@pytest.fixture
def run_folder(tmp_path) -> Any:
    """run_folder(quantization=...): a run of tiny-llama with its adapter, and the adapted model."""

    def make(quantization: str = "none") -> tuple[Path, Any]:
        recipe = Recipe.model_validate(
            {
                "name": "run",
                "model": {"name": "tiny-llama", "quantization": quantization},
                "data": {"source": "x.jsonl", "kind": "causal_lm", "prompt": "q", "completion": "a"},
                "seed": 3,
            }
        )
        base = load_model(
            recipe.model.model_copy(update={"quantization": "none"}), "causal_lm", None, load_tokenizer(recipe.model), 3
        )
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(base, lora)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml())
        (tmp_path / "run" / "metrics.jsonl").touch()
        model.save_pretrained(tmp_path / "run" / "adapter")
        return tmp_path / "run", model

    return make


def same_logits(folder: Path, model: Any, tokens: Any) -> bool:
    merged: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return torch.allclose(merged.eval()(**tokens).logits, model.eval()(**tokens).logits, atol=1e-5)


def test_a_run_is_merged_into_the_model_of_its_recipe(run_folder, tokens, tmp_path):
    run, model = run_folder()
    model.save_pretrained(run / "fit")
    for source, name in ((run, "whole"), (run / "adapter", "part"), (run / "fit", "smaller")):
        folder = export_folder(source, "merged", tmp_path / name)
        assert same_logits(folder, model, tokens)
        assert AutoTokenizer.from_pretrained(folder).chat_template == tiny_tokenizer("tiny-llama").chat_template


def test_the_template_of_the_training_is_that_of_the_merged_model(run_folder, tmp_path):
    run, _ = run_folder()
    recipe = (run / "recipe.yaml").read_text()
    data = {"source": "x.jsonl", "kind": "causal_lm", "messages": "m", "chat_template": "{{ messages[0]['content'] }}"}
    (run / "recipe.yaml").write_text(yaml.safe_dump({**yaml.safe_load(recipe), "data": data}))
    folder = export_folder(run, "merged", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder).chat_template == data["chat_template"]


def test_a_quantised_run_says_how_to_merge_and_then_does(run_folder, tokens, tmp_path):
    run, model = run_folder("nf4")
    with pytest.raises(ValueError, match=r"tiny-llama is quantised \(nf4\).*--base tiny-llama"):
        export_folder(run, "merged", tmp_path / "out")
    assert same_logits(export_folder(run, "merged", tmp_path / "out", base="tiny-llama"), model, tokens)

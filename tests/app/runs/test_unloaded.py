"""A plan from a model's config alone says what the plan of the loaded model says, and has room for 70 billions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from pedyra.app.models.tiny import tiny_tokenizer
from pedyra.app.recipe import Recipe
from pedyra.app.runs.plan import plan_run, plan_unloaded


def recipe(out: Path, **settings: Any) -> Recipe:
    given: dict[str, Any] = {
        "name": "planned",
        "model": {"name": "tiny-bert"},
        "method": "pedyra",
        "output_dir": str(out / "run"),
        "data": {"source": "toy", "max_length": 40, "train_rows": 32, "eval_rows": 8},
        "lora": {"r": 4},
        "rank": {"interval": 10, "initial_warmup": 5, "final_warmup": 10},
        "training": {"max_steps": 40, "per_device_train_batch_size": 4, "use_cpu": True},
    }
    return Recipe.model_validate({**given, **settings})


@pytest.mark.parametrize("method", ["lora", "pedyra"])
def test_it_is_the_plan_of_the_loaded_model(method, tmp_path):
    rank = {"pedyra": {"interval": 10, "initial_warmup": 5, "final_warmup": 10}}.get(method, {})
    settings: dict[str, Any] = dict(method=method, rank=rank)
    loaded, unloaded = (plan(recipe(tmp_path, **settings)) for plan in (plan_run, plan_unloaded))
    for field in ("layers", "budget", "schedule"):
        assert getattr(unloaded, field) == getattr(loaded, field), field
    for field in loaded.row.keys() - {"memory_bytes"}:
        assert unloaded.row[field] == loaded.row[field], field
    for field in ("weights", "gradients_and_optimizer"):
        assert unloaded.memory[field] == loaded.memory[field], field
    assert "activations" not in unloaded.memory
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("tiny-deberta", {}),
        ("tiny-deberta", {"kind": "question_answering", "doc_stride": 4}),
        ("tiny-bart", {"kind": "seq2seq", "prompt": "document", "completion": "summary"}),
        ("tiny-t5", {"kind": "seq2seq", "prompt": "document", "completion": "summary"}),
        ("tiny-llama", {}),
    ],
)
def test_a_base_that_looks_for_padding_is_planned(tmp_path, model, data):
    data = {"source": "toy", "max_length": 40, "train_rows": 32, "eval_rows": 8, **data}
    settings: dict[str, Any] = dict(model={"name": model}, data=data, method="lora", rank={})
    loaded, unloaded = (plan(recipe(tmp_path, **settings)) for plan in (plan_run, plan_unloaded))
    for field in loaded.row.keys() - {"memory_bytes"}:
        assert unloaded.row[field] == loaded.row[field], field


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "lora", "rank": {}, "fit": {"drop_types": ["nothing"]}}, "drop_types names 'nothing'"),
        ({"method": "randlora", "rank": {}, "fit": {}}, "fit asks how small a LoRA may be, and method randlora"),
        ({"method": "lora", "rank": {}, "fit": {}}, "fit takes 10 held-out rows or more, and data has 8"),
        ({"model": {"name": "tiny-llama", "head_dropout": 0.1}}, "model.head_dropout is 0.1, but Llama"),
        (
            {"data": {"source": "toy", "kind": "causal_lm", "prompt": "text", "completion": "label", "max_length": 40}},
            r"'tiny-bert' is an encoder \(bert\), which sees the tokens it is to predict",
        ),
    ],
)
def test_what_the_run_refuses_the_plan_refuses_too(settings, told, tmp_path):
    for plan in (plan_run, plan_unloaded):
        with pytest.raises(ValueError, match=told):
            plan(recipe(tmp_path, **settings))


def test_test_sets_that_are_not_there_are_told_by_the_plan(tmp_path):
    data = {"source": "toy", "kind": "causal_lm", "prompt": "text", "completion": "label", "max_length": 40}
    asks = {
        "model": {"name": "tiny-llama"},
        "data": data,
        "generate": {"gsm8k": {"source": str(tmp_path / "no.jsonl")}},
    }
    for plan in (plan_run, plan_unloaded):
        with pytest.raises(ValueError, match=r"generate.gsm8k.* '.*no.jsonl' does not exist"):
            plan(recipe(tmp_path, **asks))


def test_a_decoder_without_a_padding_token_of_its_own_is_planned_as_a_classifier(tmp_path):
    folder = tmp_path / "base"
    tiny_tokenizer("tiny-llama").save_pretrained(folder)
    shape: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    LlamaConfig(**shape, vocab_size=600, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    plan = plan_unloaded(recipe(tmp_path, model={"name": str(folder)}, method="lora", rank={}))
    assert plan.row["classes"] == 2


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"max_steps": 1}, "no rank could ever move"),
        ({"max_steps": 40, "load_best_model_at_end": True, "eval_strategy": "epoch"}, "load_best_model_at_end is True"),
    ],
)
def test_what_a_method_of_peft_refuses_of_a_run_is_told(tmp_path, training, told):
    with pytest.raises(ValueError, match=told):
        plan_unloaded(recipe(tmp_path, method="adalora", rank={}, training={"use_cpu": True, **training}))


def test_a_method_that_reads_the_weights_says_so(tmp_path):
    with pytest.raises(ValueError, match="method autolora looks at the model's weights .*leave --no-weights out"):
        plan_unloaded(recipe(tmp_path, method="autolora", rank={}))


def test_seventy_billion_parameters_are_planned_from_a_config(tmp_path):
    """The shape of Llama 3 70B."""
    folder = tmp_path / "base"
    shape: dict[str, Any] = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, vocab_size=128256)
    shape |= dict(num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=8192, dtype="bfloat16")
    tiny_tokenizer("tiny-llama").save_pretrained(folder)
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    rows = [{"question": "one two three", "answer": "four"} for _ in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = dict(
        model={"name": str(folder), "quantization": "nf4", "dtype": "bfloat16"},
        lora={"r": 16, "target_modules": "all-linear"},
        data={
            "kind": "causal_lm", "source": str(tmp_path / "rows.jsonl"), "max_length": 64, "eval_rows": 4,
            "prompt": "question", "completion": "answer",
        },
        training={
            "max_steps": 1000, "per_device_train_batch_size": 1, "use_cpu": True,
        },
    )  # fmt: skip
    plan = plan_unloaded(recipe(tmp_path, rank={"alpha": 0.5}, **settings))
    widths = [(8192, 8192), (8192, 1024), (8192, 1024), (8192, 8192), (8192, 28672), (8192, 28672), (28672, 8192)]
    trained = 80 * sum(16 * (inputs + outputs + 1) for inputs, outputs in widths)  # a row, a column and an E
    linear = 80 * sum(inputs * outputs for inputs, outputs in widths)
    rest = 2 * 128256 * 8192 + (2 * 80 + 1) * 8192
    assert plan.row["trainable_parameters"] == trained and plan.row["total_parameters"] == linear + rest + trained
    assert plan.memory["gradients_and_optimizer"] == 3 * 4 * trained
    assert plan.memory["weights"] == pytest.approx(linear * 4.127 / 8 + 4 * (rest + trained), rel=1e-3)

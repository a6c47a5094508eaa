"""set_up: a recipe's model, adapter and method, or a message that says what to change."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import same_bits
from short_runs import named

from pedyra.app.recipe import Recipe
from pedyra.app.runs.setup import set_up


def recipe(**changes):
    content = {
        "name": "toy",
        "method": "lora",
        "model": {"name": "tiny-bert"},
        "data": {"source": "toy", "max_length": 40, "train_rows": 16, "eval_rows": 8},
        "training": {"use_cpu": True},
        "seed": 3,
    }
    return Recipe.model_validate({**content, **changes})


def test_what_is_trained_whole_is_so_in_float32():
    """In half precision the base alone."""
    model = set_up(
        recipe(model={"name": "tiny-bert", "dtype": "bfloat16"}, training={"use_cpu": True, "bf16": True})
    ).model
    types = {parameter.requires_grad: set() for parameter in model.parameters()}
    for parameter in model.parameters():
        types[parameter.requires_grad].add(parameter.dtype)
    assert types == {True: {torch.float32}, False: {torch.bfloat16}}


@pytest.mark.parametrize("kind", ["classification", "causal_lm"])
def test_micro_batches_give_the_gradient_of_one_batch(tmp_path, kind):
    norms = []
    for accumulation in (1, 4):
        changes: dict[str, Any] = {"training": {
            "use_cpu": True, "max_steps": 1, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no",
            "per_device_train_batch_size": 16 // accumulation, "gradient_accumulation_steps": accumulation,
        }}  # fmt: skip
        if kind == "causal_lm":
            changes["model"] = {"name": "tiny-llama"}
            changes["data"] = {
                "source": "toy", "kind": kind, "prompt": "prompt", "completion": "completion", "max_length": 40,
                "train_rows": 16, "eval_rows": 8,
            }  # fmt: skip
        setup = set_up(recipe(**changes))
        for module in setup.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = setup.trainer(str(tmp_path))
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_head_and_adapter_are_those_of_the_seed_for_every_method():
    weights = {}
    for method in ("lora", "random", "pedyra"):
        torch.rand(7)  # whatever happened before must not matter
        weights[method] = set_up(
            recipe(method=named(method, start="svd") if method == "pedyra" else named(method))
        ).model.state_dict()
    own = [name for name in weights["lora"] if "lora_" in name or "classifier" in name]
    assert any("lora_A" in name for name in own) and any("classifier" in name for name in own)
    assert all(same_bits(weights["lora"][name], weights["random"][name]) for name in own)
    heads = [name for name in own if "lora_" not in name]  # the paper's start draws factors of its own
    assert all(same_bits(weights["lora"][name], weights["pedyra"][name]) for name in heads)


REFUSED = [
    # PEFT itself would train "query" alone and never speak of "valeu".
    ({"lora": {"target_modules": ["query", "valeu"]}}, "'valeu' matches no module.*candidates: query, key, value, d"),
    ({"lora": {"target_modules": r".*\.quary"}}, "quary' matches no module"),
    ({"lora": {"target_modules": "query"}}, "'query' matches no module"),
    ({"lora": {"target_modules": "("}}, r"lora.target_modules: '\(' is no regular expression"),
    ({"model": {"name": "tiny-bert", "dtype": "bfloat16"}}, "classifier.*is trained in bfloat16.* set training.bf16"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "told"), REFUSED)
def test_what_a_run_would_not_mean_is_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        set_up(recipe(**changes))


def test_held_out_rows_are_judged_in_their_order_however_those_of_training_are_taken(tmp_path):
    """An answer to a question is found by the place of its row."""
    rows = [{"text": "plot " * (1 + 7 * number % 11), "label": number % 2} for number in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(tmp_path / "d.jsonl"), "validation_fraction": 0.5}
    setup = set_up(recipe(data=data, training={"train_sampling_strategy": "group_by_length", "use_cpu": True}))
    trainer = setup.trainer(str(tmp_path))
    seen = [int(mask.sum()) for batch in trainer.get_eval_dataloader() for mask in batch["attention_mask"]]
    lengths = [len(tokens) for tokens in setup.task.eval["input_ids"]]
    assert len(set(lengths)) > 5 and seen == lengths


@pytest.mark.parametrize(
    ("kind", "best", "greater"),
    [
        ("causal_lm", {}, False),
        ("causal_lm", {"metric_for_best_model": "perplexity"}, False),
        ("causal_lm", {"metric_for_best_model": "eval_loss"}, False),
        ("classification", {}, True),
        ("classification", {"metric_for_best_model": "f1"}, True),
        ("classification", {"metric_for_best_model": "loss"}, False),
        ("classification", {"metric_for_best_model": "loss", "greater_is_better": True}, True),  # asked for
    ],
)
def test_the_best_perplexity_is_the_lowest(kind, best, greater, tmp_path):
    changes: dict[str, Any] = {"training": {"use_cpu": True, "load_best_model_at_end": True, **best}}
    changes["training"] |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    if kind == "causal_lm":
        data = {"source": "toy", "kind": kind, "prompt": "prompt", "completion": "completion", "max_length": 40}
        changes |= {"model": {"name": "tiny-llama"}, "data": {**data, "train_rows": 16, "eval_rows": 8}}
    args = set_up(recipe(**changes)).trainer(str(tmp_path)).args
    assert args.greater_is_better is greater
    assert args.metric_for_best_model == best.get(
        "metric_for_best_model", "perplexity" if kind == "causal_lm" else "accuracy"
    )


@pytest.mark.parametrize("kind", ["classification", "question_answering"])
def test_an_evaluation_keeps_no_states_of_an_encoder(tmp_path: Path, kind: str):
    """BART gives them behind its scores; of all held-out rows they would fill the memory."""
    data: dict[str, Any] = {"source": "toy", "max_length": 40, "train_rows": 16, "eval_rows": 8}
    if kind == "question_answering":
        answers = {"text": ["plot"], "answer_start": [4]}
        row = {"question": "What is old?", "context": "The plot is old.", "answers": answers}
        (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 32)
        data = {**data, "source": str(tmp_path / "rows.jsonl"), "kind": kind, "doc_stride": 8}
    setup = set_up(recipe(model={"name": "tiny-bart"}, data=data))
    trainer = setup.trainer(str(tmp_path), report_to="none")
    rows: Any = setup.task.eval
    kept = trainer.predict(rows).predictions
    shapes = [scores.shape for scores in (kept if isinstance(kept, tuple) else (kept,))]
    assert shapes == ([(8, 2)] if kind == "classification" else 2 * [(len(rows), shapes[0][1])])

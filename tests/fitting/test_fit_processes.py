"""Two processes under DDP find what one finds, and both the same; the first one writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from classifier_rows import accuracy, rows
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from together import can_fork, together
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import pedyra
from pedyra.fitting.fit import labelled
from pedyra.fitting.judge import Judge

pytestmark = pytest.mark.skipif(not can_fork(), reason="forks are for Linux without an accelerator")


def found_by(rank: int, size: int, out: str, weights: str, labelled: bool) -> dict[str, Any]:
    """Return what one process, or two, find of these weights, with held-out labels or without; a step at rate 0 sets
    up Trainer's DDP."""
    shape: Any = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["query", "value", "dense"],
        exclude_modules=["bert.pooler.dense"],
    )
    model: Any = get_peft_model(BertForSequenceClassification(BertConfig(**shape)), lora)
    model.load_state_dict(load_file(weights))
    arguments = TrainingArguments(
        out, max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, learning_rate=0.0,
        label_names=["labels"], per_device_train_batch_size=4, ddp_backend="gloo" if size > 1 else None,
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    held: Any = [row if labelled else {**row, "labels": None} for row in rows(64, 2)]
    held = [{name: value for name, value in row.items() if value is not None} for row in held]
    trainer = Trainer(model, arguments, train_dataset=rows(32, 1), eval_dataset=held, compute_metrics=accuracy)
    trainer.train()
    found = pedyra.fit(trainer, tolerance="5%") if labelled else pedyra.fit(trainer, changed="20%")
    found.save(Path(out, "small"))
    found.apply()
    trained = {name: weight.flatten().tolist() for name, weight in model.named_parameters() if "lora_" in name}
    trainer.args.learning_rate, trainer.args.max_steps = 1e-2, 3
    trainer.train()
    further = {name: weight.flatten().tolist() for name, weight in model.named_parameters() if "lora_" in name}
    assert further != trained
    return {"row": found.row(), "curve": found.curve_rows(), "trained": trained, "further": further}


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_two_processes_find_what_one_finds(make_trainer: Any, tmp_path: Path, labelled: bool):
    weights = str(tmp_path / "weights.safetensors")
    save_file(make_trainer().model.state_dict(), weights)
    first, second = together(found_by, 2, str(tmp_path / "two"), weights, labelled)
    assert first == second  # to the last bit
    two = first["row"]
    assert two["share"] < 1
    saved = load_file(tmp_path / "two" / "small" / "adapter_model.safetensors")
    assert sum(each.numel() for key, each in saved.items() if "lora_" in key) == two["parameters"]
    (alone,) = together(found_by, 1, str(tmp_path / "one"), weights, labelled)
    one = alone["row"]
    assert two["batches"] == one["batches"] and (two["won"] is not None) == labelled
    assert not labelled or two["won"] == pytest.approx(one["won"], rel=1e-4)
    for ours, theirs in zip(first["curve"], alone["curve"], strict=True):
        for key, value in theirs.items():
            near = isinstance(value, float)
            assert ours[key] == (pytest.approx(value, rel=1e-3, abs=1e-6) if near else value)
    assert two["ranks"] == one["ranks"] and two.get("metrics") == one.get("metrics")
    assert two.get("changed") == one.get("changed") and ("changed" in two)


def kept_by(rank: int, size: int, out: str) -> list[int]:
    """Numbers of the batches that a process keeps; the second one's third batch has no label."""
    PartialState(cpu=True)
    batches: list[Any] = [{"labels": torch.tensor([number, 1])} for number in range(4)]
    if rank == 1:
        batches[2] = {"labels": torch.tensor([-100, -100])}
    return [int(batch["labels"][0]) for batch in labelled(Judge(torch.nn.Linear(1, 1)), batches)]


def test_a_batch_without_a_label_is_left_out_in_every_process(tmp_path: Path):
    """A loss that gathers over the processes would wait for one that has fewer batches."""
    assert together(kept_by, 2, str(tmp_path)) == [[0, 1, 3], [0, 1, 3]]

"""A task is what Trainer takes: padded batches, the named metric, the same rows for the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from pedyra.app.models.base import load_model, load_tokenizer
from pedyra.app.recipe_sections import DataSection, ModelSection
from pedyra.app.tasks.task import Task, load_task

CAUSAL: dict[str, Any] = {"kind": "causal_lm", "prompt": "prompt", "completion": "completion"}
KINDS: dict[str, dict[str, Any]] = {
    "classification": {},
    "pairs": {"kind": "pairs", "text_pair": "text_pair", "label": "same", "metric": "f1"},
    "regression": {"kind": "regression", "label": "score", "metric": "spearman"},
    "causal_lm": CAUSAL,
    "seq2seq": {"kind": "seq2seq", "prompt": "document", "completion": "summary"},
    "question_answering": {"kind": "question_answering", "max_length": 64, "doc_stride": 16},
}
MODELS = {"causal_lm": "tiny-llama", "seq2seq": "tiny-bart", "question_answering": "tiny-deberta"}


def toy_task(seed: int = 0, model: str = "tiny-bert", **data: Any) -> Task:
    section = DataSection(**{"source": "toy", "train_rows": 24, "eval_rows": 10, **data})
    return load_task(section, load_tokenizer(ModelSection(name=model)), seed)


@pytest.mark.parametrize(
    ("kind", "num_labels", "metric"),
    [
        ("classification", 2, "accuracy"),
        ("pairs", 2, "f1"),
        ("regression", 1, "spearman"),
        ("causal_lm", None, "perplexity"),
        ("seq2seq", None, "perplexity"),
        ("question_answering", None, "f1"),
    ],
)
def test_every_kind_evaluates_in_a_stock_trainer(kind: str, num_labels: int | None, metric: str, tmp_path: Path):
    name = MODELS.get(kind, "tiny-bert")
    task = toy_task(model=name, **KINDS[kind])
    assert (task.kind, task.num_labels, task.metric) == (kind, num_labels, metric)
    section = ModelSection(name=name)
    tokenizer = load_tokenizer(section)
    model = load_model(section, task.kind, task.num_labels, tokenizer, seed=0)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_eval_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        label_names=list(task.targets),
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, args, processing_class=tokenizer, **task.trainer_arguments())
    scores = trainer.evaluate()
    assert f"eval_{metric}" in scores
    # The same by hand, one row at a time, without padding.
    model.eval()
    with torch.no_grad():
        losses = [model(**task.collator([row])).loss.item() for row in task.eval.to_list()]
    if kind in ("causal_lm", "seq2seq"):
        tokens = [sum(label != -100 for label in row["labels"]) for row in task.eval.to_list()]
        mean = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
        assert scores["eval_token_loss"] == pytest.approx(mean, rel=1e-5)
    elif kind == "classification":
        rows = task.eval.to_list()
        with torch.no_grad():
            right = [model(**task.collator([row])).logits.argmax().item() == row["labels"] for row in rows]
        assert scores["eval_accuracy"] == pytest.approx(sum(right) / 10)
        assert scores["eval_loss"] == pytest.approx(sum(losses) / 10, rel=1e-5)


def test_a_batch_is_padded_to_its_own_longest_row():
    task = toy_task(model="tiny-llama", **CAUSAL)
    long = task.train.to_list()[0]
    missing = 3
    short = {name: column[:-missing] for name, column in long.items()}
    batch = task.collator([short, long])
    assert batch["input_ids"].shape == (2, len(long["input_ids"]))
    assert batch["input_ids"][0, -missing:].tolist() == [0] * missing
    assert batch["labels"][0, -missing:].tolist() == [-100] * missing
    assert batch["attention_mask"].sum().item() == len(short["input_ids"]) + len(long["input_ids"])


def test_pairs_are_joined_as_the_tokenizer_joins_them():
    row = toy_task(**KINDS["pairs"]).train.to_list()[0]
    text = load_tokenizer(ModelSection(name="tiny-bert")).decode(row["input_ids"])
    assert text.count("[SEP]") == 2
    assert set(row["token_type_ids"]) == {0, 1}


def test_the_seed_decides_the_rows():
    first, same, other = toy_task(seed=1), toy_task(seed=1), toy_task(seed=2)
    assert first.train.to_list() == same.train.to_list()
    assert first.eval.to_list() == same.eval.to_list()
    assert first.eval.to_list() != other.eval.to_list()


@pytest.mark.parametrize(
    ("train", "held", "told"),
    [
        ("a,0\nb,1\n", "a,2\n", "label '2' is none of the classes 0, 1;"),
        ("a,0\nb,1\n", "", "the validation rows of data.source are empty"),
        ("", None, "the data holds no rows; check data.source"),
        ("a,0\n", None, "leaves an empty side"),
    ],
)
def test_rows_that_make_no_task_are_told(tmp_path: Path, train: str, held: str | None, told: str):
    (tmp_path / "train.csv").write_text("text,label\n" + train)
    (tmp_path / "val.csv").write_text("text,label\n" + (held or ""))
    with pytest.raises(ValueError, match=told):
        toy_task(source=str(tmp_path / "train.csv"), validation=None if held is None else str(tmp_path / "val.csv"))

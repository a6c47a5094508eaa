"""The `data` section of a recipe becomes a `Task`, which has what a Trainer needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase

from pedyra.app.recipe_sections import GENERATED, METRICS, DataSection
from pedyra.app.tasks import causal_lm, metrics, question_answering, seq2seq, text
from pedyra.app.tasks.sources import Rows, check_apart, held_out, load_rows, sample
from pedyra.app.tasks.tokens import with_limit


@dataclass(frozen=True, kw_only=True)
class Task:
    """Tokenised data, and how a model is evaluated on it. Batches are padded to their own longest row."""

    kind: str
    train: Dataset
    eval: Dataset
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    num_labels: int | None  # outputs of the head: classes, 1 for regression; None where the task has no classes
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    preprocess_logits: Callable[[Any, Any], Any]  # a causal LM keeps two numbers a row and no logits
    metric: str  # the key of compute_metrics by which a run is evaluated
    classes: list[str] | None  # as `data.labels` they give the rows of another file the same numbers
    targets: tuple[str, ...]  # columns that are targets, which Trainer cannot find out from a PEFT model
    held_out: Rows  # the rows of `eval` as they were read

    def digest(self, *, train_only: bool = False) -> str:
        """Compute SHA-256 of the tokens and labels."""
        digest = hashlib.sha256()
        for rows in (self.train,) if train_only else (self.train, self.eval):
            for batch in rows.iter(batch_size=1000):
                digest.update(json.dumps(batch, sort_keys=True).encode())
        return digest.hexdigest()

    def trainer_arguments(self) -> dict[str, Any]:
        return {
            "train_dataset": self.train,
            "eval_dataset": self.eval,
            "data_collator": self.collator,
            "compute_metrics": self.compute_metrics,
            "preprocess_logits_for_metrics": self.preprocess_logits,
        }


def load_task(data: DataSection, tokenizer: PreTrainedTokenizerBase, seed: int, positions: int | None = None) -> Task:
    """Read, split, sample and tokenise the data of a recipe; the same seed gives the same rows in the same order. Rows
    longer than the `positions` that the base has are truncated, and their number is logged."""
    data = with_limit(data, tokenizer, positions)
    train, evaluation, class_names = load_rows(data)
    every = train  # classes are those of all rows, whatever is drawn and held out
    if evaluation is None:
        train, evaluation = held_out(train, data.validation_fraction, data.group_by, seed)
    check_apart(train, evaluation, data.group_by)
    train = sample(train, data.train_rows, seed, "training")
    evaluation = sample(evaluation, data.eval_rows, seed, "validation")
    labels: text.Labels | None = None
    targets: tuple[str, ...] = ("labels",) if data.labelled else ()
    collator: Any = DataCollatorWithPadding(tokenizer)
    if data.kind == "question_answering":
        eval_features, parts = question_answering.encode(evaluation, data, tokenizer, "validation")
        train_features, _ = question_answering.encode(train, data, tokenizer, "training")
        compute_metrics = question_answering.metrics(evaluation, parts)
        preprocess, targets = question_answering.start_and_end, tuple(question_answering.LABELS)
    elif data.kind in GENERATED:
        module = causal_lm if data.kind == "causal_lm" else seq2seq
        eval_features = module.encode(evaluation, data, tokenizer, "validation")
        train_features = module.encode(train, data, tokenizer, "training")
        collator, compute_metrics = DataCollatorForSeq2Seq(tokenizer), metrics.perplexity
        preprocess = module.answer_loss
    else:
        labels = text.known_labels(every, data, class_names)
        eval_features = text.encode(evaluation, data, tokenizer, labels, "validation")
        train_features = text.encode(train, data, tokenizer, labels, "training")
        compute_metrics = metrics.correlation if data.kind == "regression" else metrics.classification
        preprocess = metrics.first_output
    return Task(
        kind=data.kind,
        train=Dataset.from_list(train_features),
        eval=Dataset.from_list(eval_features),
        collator=collator,
        num_labels=labels.count if labels else None,
        compute_metrics=compute_metrics,
        preprocess_logits=preprocess,
        metric=data.metric or METRICS[data.kind][0],
        classes=list(labels.names) if labels and labels.names else None,
        targets=targets,
        held_out=evaluation,
    )

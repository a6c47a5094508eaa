"""From the `data` section of a recipe to what a Trainer needs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase

from pedyra.recipe_sections import METRICS, DataSection
from pedyra.tasks import causal_lm, labels, metrics, text
from pedyra.tasks.sources import load_rows
from pedyra.tasks.split import held_out, sample


@dataclass(frozen=True, kw_only=True)
class Task:
    """Tokenised data, and how a model is judged on it. Batches are padded to their own longest row."""

    kind: str
    """classification, pairs, regression, causal_lm or planted."""
    train: Dataset
    eval: Dataset
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    num_labels: int | None
    """Outputs of the head: classes, 1 for regression, None for causal_lm and planted, which have none."""
    label_names: tuple[str, ...] | None
    """Class names in the order of their numbers, where the data has names."""
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    preprocess_logits: Callable[[Any, Any], Any] | None
    """Trainer's preprocess_logits_for_metrics: causal_lm keeps two numbers a row, not the logits."""
    metric: str
    """The metric that counts, a key of what compute_metrics gives; Trainer logs it as eval_<metric>."""
    greater_is_better: bool

    def digest(self, *, train_only: bool = False) -> str:
        """SHA-256 of the tokens and labels that are trained on and judged by, whatever library holds them."""
        digest = hashlib.sha256()
        for rows in (self.train,) if train_only else (self.train, self.eval):
            table: Any = rows.with_format("arrow")[:]
            for name in sorted(table.column_names):
                values = table[name].combine_chunks()
                digest.update(name.encode())
                while hasattr(values, "value_lengths"):  # a list
                    digest.update(values.value_lengths().to_numpy(zero_copy_only=False).astype("int64").tobytes())
                    values = values.flatten()
                numbers = values.to_numpy(zero_copy_only=False)
                digest.update(numbers.astype("float64" if numbers.dtype.kind == "f" else "int64").tobytes())
        return digest.hexdigest()

    def trainer_arguments(self) -> dict[str, Any]:
        """The keyword arguments of transformers.Trainer that come from the task."""
        return {
            "train_dataset": self.train,
            "eval_dataset": self.eval,
            "data_collator": self.collator,
            "compute_metrics": self.compute_metrics,
            "preprocess_logits_for_metrics": self.preprocess_logits,
        }


def load_task(data: DataSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> Task:
    """Read, split, sample and tokenise the data of a recipe; the same seed gives the same rows in the same order.

    Raises ValueError, one line, for a source that does not exist, a column it does not have, labels that are
    missing or out of range, an empty split, and answers that all lie beyond max_length; ImportError where the
    package that carries the source is not installed.
    """
    train, evaluation, class_names = load_rows(data)
    every = train  # classes are those of all rows, whatever is drawn and held out
    if evaluation is None:
        train, evaluation = held_out(train, data.validation_fraction, data.group_by, seed)
    train = sample(train, data.train_rows, seed, "training")
    evaluation = sample(evaluation, data.eval_rows, seed, "validation")
    if data.kind == "planted":
        from pedyra.tasks.planted import planted_task  # which is made of what stands here

        return planted_task(train, evaluation, data.profile)
    metric = data.metric or METRICS[data.kind][0]
    if data.kind == "causal_lm":
        return Task(
            kind=data.kind,
            train=Dataset.from_list(causal_lm.encode(train, data, tokenizer, "training")),
            eval=Dataset.from_list(causal_lm.encode(evaluation, data, tokenizer, "validation")),
            collator=DataCollatorForSeq2Seq(tokenizer),
            num_labels=None,
            label_names=None,
            compute_metrics=metrics.perplexity,
            preprocess_logits=causal_lm.answer_loss,
            metric=metric,
            greater_is_better=False,
        )
    known = labels.known_labels(every, data, class_names)
    return Task(
        kind=data.kind,
        train=Dataset.from_list(text.encode(train, data, tokenizer, known)),
        eval=Dataset.from_list(text.encode(evaluation, data, tokenizer, known)),
        collator=DataCollatorWithPadding(tokenizer),
        num_labels=known.count,
        label_names=known.names,
        compute_metrics=metrics.correlation if data.kind == "regression" else metrics.classification,
        preprocess_logits=None,
        metric=metric,
        greater_is_better=True,
    )

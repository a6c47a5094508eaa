"""From the `data` section of a recipe to a `Task`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from pedyra.app.recipe_sections import GENERATED, METRICS, DataSection
from pedyra.app.tasks import causal_lm, metrics, question_answering, seq2seq, text
from pedyra.app.tasks.sources import Rows, held_out, load_rows, sample
from pedyra.app.tasks.task import Compute, Task
from pedyra.app.tasks.tokens import with_limit


def load_task(data: DataSection, tokenizer: PreTrainedTokenizerBase, seed: int, positions: int | None = None) -> Task:
    """Read, split, sample and tokenise the data of a recipe; the same seed gives the same rows in the same order.

    positions: tokens that the base takes, `models.positions`; longer rows are cut there, and their number is logged.

    Raises ValueError, one line, for a source that does not exist, a column it does not have, labels that are
    missing or out of range, an empty split, and answers that all lie beyond max_length; ImportError where the
    package that carries the source is not installed.
    """
    data = with_limit(data, tokenizer, positions)
    train, evaluation, class_names = load_rows(data)
    every = train  # classes are those of all rows, whatever is drawn and held out
    if evaluation is None:
        train, evaluation = held_out(train, data.validation_fraction, data.group_by, seed)
    train = sample(train, data.train_rows, seed, "training")
    evaluation = sample(evaluation, data.eval_rows, seed, "validation")
    family = _family(data, tokenizer, every, class_names)
    judged, compute_metrics = family.encode(evaluation, "validation")
    return Task(
        kind=data.kind,
        train=Dataset.from_list(family.encode(train, "training")[0]),
        eval=Dataset.from_list(judged),
        collator=family.collator,
        num_labels=family.labels.count if family.labels else None,
        compute_metrics=compute_metrics,
        preprocess_logits=family.preprocess_logits,
        metric=data.metric or METRICS[data.kind][0],
        greater_is_better=data.kind not in GENERATED,
        targets=family.targets,
        held_out=evaluation,
    )


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What a kind of task does with rows."""

    encode: Callable[[Rows, str], tuple[list[dict[str, Any]], Compute]]
    """Rows, and what they are called in an error -> the model's inputs, and what judges predictions for them."""
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    preprocess_logits: Callable[[Any, Any], Any] | None = None
    labels: text.Labels | None = None
    targets: tuple[str, ...] = ("labels",)


def _family(data: DataSection, tokenizer: PreTrainedTokenizerBase, every: Rows, names: list[str] | None) -> _Family:
    if data.kind == "question_answering":

        def encode(rows: Rows, side: str) -> tuple[list[dict[str, Any]], Compute]:
            features, parts = question_answering.encode(rows, data, tokenizer, side)
            return features, question_answering.metrics(rows, parts, data)

        return _Family(
            encode=encode, collator=DataCollatorWithPadding(tokenizer), targets=tuple(question_answering.LABELS)
        )
    if data.kind in GENERATED:
        module = causal_lm if data.kind == "causal_lm" else seq2seq
        return _Family(
            encode=lambda rows, side: (module.encode(rows, data, tokenizer, side), metrics.perplexity),
            collator=DataCollatorForSeq2Seq(tokenizer),
            preprocess_logits=module.answer_loss,
        )
    known = text.known_labels(every, data, names)
    judge = metrics.correlation if data.kind == "regression" else metrics.classification
    return _Family(
        encode=lambda rows, side: (text.encode(rows, data, tokenizer, known, side), judge),
        collator=DataCollatorWithPadding(tokenizer),
        labels=known,
    )

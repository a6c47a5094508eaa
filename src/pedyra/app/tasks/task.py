"""What a Trainer needs of a task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import EvalPrediction

from pedyra.app.tasks.sources import Rows

Compute = Callable[[EvalPrediction], dict[str, float]]
"""Metrics of predictions by name, as Trainer's compute_metrics."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Tokenised data, and how a model is judged on it. Batches are padded to their own longest row."""

    kind: str
    """As data.kind."""
    train: Dataset
    eval: Dataset
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    num_labels: int | None
    """Outputs of the head: classes, 1 for regression; None where the task brings no new classes."""
    compute_metrics: Compute
    preprocess_logits: Callable[[Any, Any], Any] | None
    """Trainer's preprocess_logits_for_metrics: causal_lm keeps two numbers a row, not the logits."""
    metric: str
    """The metric that counts, a key of what compute_metrics gives; Trainer logs it as eval_<metric>."""
    greater_is_better: bool
    targets: tuple[str, ...] = ("labels",)
    """The columns that are targets; Trainer cannot see through PEFT which they are."""
    held_out: Rows = field(default_factory=list)
    """The rows of `eval` as they were read."""

    def digest(self, *, train_only: bool = False) -> str:
        """SHA-256 of the tokens and labels that are trained on and judged by."""
        digest = hashlib.sha256()
        for rows in (self.train,) if train_only else (self.train, self.eval):
            for batch in rows.iter(batch_size=1000):
                digest.update(json.dumps(batch, sort_keys=True).encode())
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

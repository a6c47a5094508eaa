"""The metrics of tasks, as functions of transformers.EvalPrediction."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction


def classification(prediction: EvalPrediction) -> dict[str, float]:
    """Compute accuracy, F1 (of class 1 for two classes, else the mean over classes) and Matthews correlation."""
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    guesses = logits.argmax(axis=-1)
    average = "binary" if logits.shape[-1] == 2 else "macro"
    return {
        "accuracy": float(accuracy_score(labels, guesses)),
        "f1": float(f1_score(labels, guesses, average=average, zero_division=0)),  # pyright: ignore[reportArgumentType]
        "matthews": float(matthews_corrcoef(labels, guesses)),
    }


def correlation(prediction: EvalPrediction) -> dict[str, float]:
    """Compute Pearson's and Spearman's correlation and their mean (`combined`, GLUE's score of STS-B): 0 where guesses
    or labels are constant, as nothing follows anything then."""
    guesses, labels = np.ravel(prediction.predictions), np.ravel(prediction.label_ids)
    if np.ptp(guesses) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearman": 0.0, "combined": 0.0}
    pearson, spearman = (float(function(guesses, labels)[0]) for function in (pearsonr, spearmanr))  # pyright: ignore
    return {"pearson": pearson, "spearman": spearman, "combined": (pearson + spearman) / 2}


def perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """Compute exp of the mean loss over all answer tokens from the two columns of `causal_lm.answer_loss`.

    Trainer's own eval_loss is a mean over batches, so it shifts a little with the batch size; this does not.
    """
    loss, tokens = np.asarray(prediction.predictions).sum(axis=0, dtype=np.float64)
    mean = float(loss / tokens)
    return {"token_loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf}


def first_output(outputs: Any, labels: Any) -> Any:
    """Keep the logits alone, as Trainer's preprocess_logits_for_metrics: the encoder's states of BART and T5 would take
    many gigabytes over all held-out rows."""
    return outputs[0] if isinstance(outputs, tuple) else outputs

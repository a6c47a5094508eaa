"""Metrics against hand arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from pedyra.app.tasks import metrics
from pedyra.app.tasks.causal_lm import answer_loss


def one_hot(guesses: list[int], classes: int = 2) -> np.ndarray:
    return np.eye(classes)[guesses]


def test_two_classes_by_hand():
    # True positives 2, false negatives 1, false positives 1, true negatives 2.
    scores = metrics.classification(EvalPrediction(one_hot([1, 1, 0, 1, 0, 0]), np.array([1, 1, 1, 0, 0, 0])))
    assert scores == pytest.approx({"accuracy": 4 / 6, "f1": 2 * 2 / (2 * 2 + 1 + 1), "matthews": (4 - 1) / 9})


def test_three_classes_average_f1():
    scores = metrics.classification(EvalPrediction(one_hot([0, 1, 1, 1], 3), np.array([0, 1, 1, 2])))
    assert scores["f1"] == pytest.approx((1 + 2 * 2 / (2 * 2 + 1) + 0) / 3)


def test_a_guess_of_one_class_scores_zero_without_a_warning():
    scores = metrics.classification(EvalPrediction(one_hot([0, 0]), np.array([0, 1])))
    assert (scores["f1"], scores["matthews"]) == (0, 0)


def test_correlations_see_order_and_line():
    guesses, labels = np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 3.0, 2.0])
    scores = metrics.correlation(EvalPrediction((guesses,), labels))
    # Deviations (-4/3, -1/3, 5/3) and (-1, 1, 0): 1 / sqrt(42 / 9 * 2); ranks 1 2 3 and 1 3 2.
    pearson = 1 / math.sqrt(42 / 9 * 2)
    assert scores == pytest.approx({"pearson": pearson, "spearman": 0.5, "combined": (pearson + 0.5) / 2})


def test_constant_guesses_correlate_with_nothing():
    scores = metrics.correlation(EvalPrediction(np.ones((3, 1)), np.array([1.0, 2.0, 3.0])))
    assert set(scores.values()) == {0.0}


def test_perplexity_weighs_tokens_not_batches():
    vocabulary = 5
    logits = torch.randn(2, 4, vocabulary)
    labels = torch.tensor([[-100, -100, 3, 1], [-100, -100, -100, 2]])
    log_probabilities = logits.log_softmax(-1)
    losses = [-log_probabilities[0, 1, 3], -log_probabilities[0, 2, 1], -log_probabilities[1, 2, 2]]
    by_row = answer_loss((logits, torch.empty(0)), labels)
    torch.testing.assert_close(by_row, torch.tensor([[losses[0] + losses[1], 2.0], [losses[2], 1.0]]))
    scores = metrics.perplexity(EvalPrediction(by_row.numpy(), labels.numpy()))
    mean = float(sum(losses)) / 3
    assert scores == pytest.approx({"token_loss": mean, "perplexity": math.exp(mean)}, rel=1e-5)


def test_a_hopeless_loss_is_an_infinite_perplexity():
    scores = metrics.perplexity(EvalPrediction(np.array([[2000.0, 2.0]]), np.zeros((1, 1))))
    assert scores["perplexity"] == math.inf

"""The figures show of a run what is computed by hand here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from pedyra.app.report.records import UNFINISHED, RunRecords, make_layers
from pedyra.lab.paper.figures import MEASURES, mean_by_layer, spearman


def run(ranks: dict[str, int] | None = None, **records: Any) -> RunRecords:
    ranks = ranks or {"a": 2, "b": 2, "c": 2}
    layers = make_layers([{"name": name, "type": name, "depth": 0, "rank": rank} for name, rank in ranks.items()])
    empty = {field.name: {} if field.type == "Record" else [] for field in fields(RunRecords)}
    return RunRecords(**{**empty, "path": Path("run"), "layers": layers, "final": UNFINISHED, **records})


def adjustment(step: int, scores: Sequence[float], ranks: list[int], **more: Any) -> dict[str, Any]:
    named = {"layer_scores": dict(zip("abc", scores, strict=True)), "ranks": dict(zip("abc", ranks, strict=True))}
    return {"step": step, **named, **more}


def test_stability_is_the_mean_correlation_of_a_ranking_with_the_one_before():
    # The second ranking is the first, the third its reverse: (1 - 1) / 2.
    records = [adjustment(step, scores, [2, 2, 2]) for step, scores in enumerate(([1, 2, 3], [4, 5, 6], [3, 2, 1]))]
    assert MEASURES["ranking_stability"](run(adjustments=records)) == pytest.approx(0.0)
    assert MEASURES["ranking_stability"](run(adjustments=records[:2])) == pytest.approx(1.0)
    assert MEASURES["ranking_stability"](run(adjustments=records[:1])) is None


def test_ranks_that_follow_importance_correlate_with_it():
    records = [adjustment(2, [1.0, 2.0, 3.0], [1, 2, 3]), adjustment(4, [1.0, 2.0, 3.0], [1, 2, 3])]
    assert MEASURES["rank_importance_correlation"](run(adjustments=records)) == pytest.approx(1.0)
    assert MEASURES["change_importance_correlation"](run(adjustments=records)) == pytest.approx(1.0)
    against = [adjustment(2, [3.0, 2.0, 1.0], [1, 2, 3])]
    assert MEASURES["rank_importance_correlation"](run(adjustments=against)) == pytest.approx(-1.0)


def test_the_gini_coefficient_of_ranks():
    assert MEASURES["rank_gini"](run({"a": 4, "b": 4, "c": 4})) == pytest.approx(0.0)
    # sum of |x_i - x_j| over all pairs is 2 (6 + 6 + 0) = 24; over 2 n^2 mean = 2 * 9 * 2 = 36.
    assert MEASURES["rank_gini"](run({"a": 0, "b": 0, "c": 6})) == pytest.approx(24 / 36)


def test_the_share_of_masked_triples_that_come_back():
    masked = [[["a", 0], ["b", 1]], [["a", 0], ["b", 0], ["c", 0]], [["a", 0], ["b", 0], ["c", 0]]]
    records = [adjustment(step, [1, 2, 3], [2, 2, 2], masked=each) for step, each in enumerate(masked)]
    # b 1 of two came back at first, none of three after that.
    assert MEASURES["reactivated_share"](run(adjustments=records)) == pytest.approx((0.5 + 0.0) / 2)


def test_time_an_epoch_memory_and_share():
    one = run(
        metrics=[{"step": 5, "epoch": 0.5}, {"step": 10, "epoch": 2.5}],
        final={"seconds": 50.0, "peak_memory_bytes": 900, "trainable_parameters": 3, "total_parameters": 12},
        environment={"memory_before_bytes": 400},
    )
    assert MEASURES["seconds_per_epoch"](one) == 20.0
    assert MEASURES["peak_memory_difference"](one) == 500
    assert MEASURES["trainable_share"](one) == 0.25


def test_gradient_norms_and_losses_are_averages_over_what_was_logged():
    snapshots = [
        {"step": 1, "grad_norms": {"a": [1.0, 2.0, 3.0], "b": [3.0, 4.0, 5.0]}},
        {"step": 2, "grad_norms": None},
        {"step": 3, "grad_norms": {"a": [4.0, 5.0, 6.0], "b": [4.0, 5.0, 6.0]}},
    ]
    one = run(snapshots=snapshots, metrics=[{"step": s, "loss": loss} for s, loss in enumerate([4.0, 2.0, 2.0])])
    assert [MEASURES[f"gradient_norm_{name}"](one) for name in "AEB"] == [3.0, 4.0, 5.0]
    assert MEASURES["mean_training_loss"](one) == pytest.approx(8 / 3)
    assert MEASURES["loss_roughness"](one) == pytest.approx(1.0)  # changes -2 and 0, around -1


def test_mean_by_layer():
    assert mean_by_layer([{"a": 1, "b": 4}, {"a": 3, "b": 4}]) == {"a": 2.0, "b": 4.0}
    assert mean_by_layer([]) == {}


def test_spearman_gives_ties_their_mean_place():
    # Places 1, 2.5, 2.5, 4 against 1 2 3 4: Pearson of those is 4.5 / sqrt(4.5 * 5).
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@pytest.mark.parametrize(("x", "y"), [([8, 8, 8], [1, 2, 3]), ([1, 2, 3], [0, 0, 0]), ([1, 2], [2, 1])])
def test_spearman_is_undefined_for_a_constant_or_two_points(x, y):
    assert spearman(x, y) is None

"""The diagnostic of Fig. 5, by hand."""

from __future__ import annotations

import math

import pytest

from pedyra.pe_dyra.equations import two_thirds_log_variance


def test_fig5_by_hand_and_lower_nearer_to_eq8():
    scores = {"a": 1.0, "b": 8.0}
    assert two_thirds_log_variance(scores, {"a": 1, "b": 1}) == pytest.approx(math.log(4.5))  # 1 and 4 around 2.5
    assert two_thirds_log_variance(scores, {"a": 1, "b": 2}) == pytest.approx(math.log(0.5))


def test_fig5_is_undefined_at_the_optimum_and_for_one_layer():
    assert two_thirds_log_variance({"a": 2.0, "b": 2.0}, {"a": 3, "b": 3}) is None
    assert two_thirds_log_variance({"a": 1.0, "b": 8.0}, {"a": 1, "b": 0}) is None

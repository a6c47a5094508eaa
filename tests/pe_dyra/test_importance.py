"""Eqs. (3) to (6), Algorithm 1 and Fig. 5 against loops written straight from the paper, and by hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from closeness import same_bits

from pedyra.allocate.scores import update_sensitivity_
from pedyra.pe_dyra.equations import (
    gradient_scores,
    gradient_weights,
    input_scores,
    mix_scores,
    two_thirds_log_variance,
)

R, IN, OUT = 3, 5, 4


def test_eq3_by_hand_the_uncertainty_uses_the_updated_sensitivity():
    sensitivity, uncertainty = torch.zeros(1), torch.zeros(1)
    update_sensitivity_(sensitivity, uncertainty, torch.tensor([8.0]), beta1=0.75, beta2=0.5)
    assert sensitivity.tolist() == [2.0]  # 0.25 * 8
    assert uncertainty.tolist() == [3.0]  # 0.5 * |8 - 2|, not 0.5 * |8 - 0|


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_one_non_finite_product_changes_nothing(bad):
    sensitivity, uncertainty = torch.rand(4), torch.rand(4)
    before = sensitivity.clone(), uncertainty.clone()
    product = torch.tensor([1.0, bad, 2.0, 3.0])
    assert not update_sensitivity_(sensitivity, uncertainty, product, beta1=0.85, beta2=0.85)
    assert same_bits(sensitivity, before[0]) and same_bits(uncertainty, before[1])


def test_eq5_by_hand():
    assert gradient_weights(torch.tensor([1.0, 2.0, 5.0])).tolist() == [0.125, 0.25, 0.625]


def test_eq5_without_any_gradient_weighs_equally():
    assert gradient_weights(torch.zeros(2, 3)).tolist() == [[pytest.approx(1 / 3)] * 3] * 2


def test_eq5_keeps_the_ratio_of_gradients_near_underflow():
    assert gradient_weights(torch.tensor([1e-30, 3e-30, 0.0])).tolist() == pytest.approx([0.25, 0.75, 0.0])


def test_eq6_by_hand():
    score = input_scores(
        torch.tensor([[1.0, -2.0]]), torch.tensor([-3.0]), torch.tensor([[3.0], [4.0]]), torch.tensor([10.0, 1.0])
    )
    assert score.tolist() == [3 * (10 + 2) * 5]


def test_a_layer_of_rank_zero_has_no_scores():
    empty = torch.zeros(0, IN), torch.zeros(0), torch.zeros(OUT, 0)
    assert gradient_scores(*empty, torch.ones(3)).shape == (0,)
    assert input_scores(*empty, torch.ones(IN)).shape == (0,)


def test_mixing_by_mean_by_hand():
    gradient, inputs = torch.tensor([1.0, 3.0]), torch.tensor([4e6, 0.0])  # means 2 and 2e6
    mixed = mix_scores(gradient, inputs, alpha=0.25, norm="mean")
    assert mixed.tolist() == [0.25 * 0.5 + 0.75 * 2.0, 0.25 * 1.5]


def test_literal_mixing_is_the_plain_sum():
    gradient, inputs = torch.tensor([1.0, 3.0]), torch.tensor([8.0, 0.0])
    assert mix_scores(gradient, inputs, alpha=0.25, norm="none").tolist() == [6.25, 0.75]


@pytest.mark.parametrize("norm", ["mean", "none"])
def test_alpha_at_its_ends_orders_by_one_score_alone(norm):
    gradient, inputs = torch.rand(20), torch.rand(20) * 1e7
    for alpha, alone in ((1.0, gradient), (0.0, inputs)):
        assert same_bits(mix_scores(gradient, inputs, alpha=alpha, norm=norm).argsort(), alone.argsort())


@pytest.mark.parametrize("norm", ["mean", "none"])
def test_all_zero_scores_stay_zero(norm):
    assert mix_scores(torch.zeros(4), torch.zeros(4), alpha=0.5, norm=norm).tolist() == [0.0] * 4


def test_fig5_by_hand_and_lower_nearer_to_eq8():
    scores = {"a": 1.0, "b": 8.0}
    assert two_thirds_log_variance(scores, {"a": 1, "b": 1}) == pytest.approx(math.log(4.5))  # 1 and 4 around 2.5
    assert two_thirds_log_variance(scores, {"a": 1, "b": 2}) == pytest.approx(math.log(0.5))


def test_fig5_is_undefined_at_the_optimum_and_for_one_layer():
    assert two_thirds_log_variance({"a": 2.0, "b": 2.0}, {"a": 3, "b": 3}) is None
    assert two_thirds_log_variance({"a": 1.0, "b": 8.0}, {"a": 1, "b": 0}) is None

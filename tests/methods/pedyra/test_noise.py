"""Errors of gains, and what the largest of many reaches by chance, against slow loops and drawn noise."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import pytest
import torch

from pedyra.methods.pedyra.noise import PATTERNS, chance, fewest_steps, means_and_errors


def owners(directions: int, width: int) -> torch.Tensor:
    return torch.arange(directions) // width


def test_an_error_is_that_of_a_mean_but_never_below_its_layers():
    values = torch.tensor([[1.0, 10.0, 7.0], [3.0, 20.0, 7.0], [5.0, 60.0, 10.0]])
    mean, error = means_and_errors(values, torch.tensor([0, 0, 1]))
    first, second, third = (values[:, i].var().item() for i in range(3))
    assert mean.tolist() == [3.0, 30.0, 8.0]
    own = [(first + second) / 2, max(second, (first + second) / 2), third]
    assert error.tolist() == pytest.approx([math.sqrt(variance / 3) for variance in own])


def test_chance_is_the_quantile_over_every_pattern_of_signs():
    values = torch.randn(6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer_of, among = owners(10, 5), torch.arange(10) % 5 < 4
    largest = []
    for signs in itertools.product((1.0, -1.0), repeat=6):
        mean, error = means_and_errors(values * torch.tensor(signs)[:, None], layer_of)
        largest.append((mean / error)[among].max().item())
    largest.sort(reverse=True)
    for certainty in (0.5, 1.0, 2.0):
        level = 2 * NormalDist().cdf(-certainty)
        bound = chance(values, layer_of, among, certainty)
        assert bound == pytest.approx(max(certainty, largest[int(level * 64)]))


@pytest.mark.parametrize("steps", [8, 20])
def test_noise_is_beyond_chance_as_seldom_as_it_says(steps):
    # Directions of unequal spread, in pairs that move together.
    generator = torch.Generator().manual_seed(0)
    spread, layer_of = torch.linspace(0.3, 3, 24), owners(24, 8)
    among = torch.ones(24, dtype=torch.bool)
    beyond, draws = 0, 400
    for _ in range(draws):
        values = torch.randn(steps, 24, generator=generator)
        values[:, 1::2] += values[:, ::2]
        values *= spread
        mean, error = means_and_errors(values, layer_of)
        beyond += bool((mean / error).max() > chance(values, layer_of, among, 1.5))
    level = 2 * NormalDist().cdf(-1.5)  # 0.134
    assert beyond / draws == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / draws))


def test_a_gain_in_one_layer_does_not_hide_behind_its_own_size():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(12, 24, generator=generator)
    values[:, 3] += 10
    mean, error = means_and_errors(values, owners(24, 8))
    assert (mean / error)[3] > chance(values, owners(24, 8), torch.ones(24, dtype=torch.bool), 3.0)


@pytest.mark.parametrize(("certainty", "steps"), [(3.0, 40), (3.5, 40), (4.0, 40), (4.0, 14)])
def test_a_gain_far_beyond_noise_is_told_at_every_certainty_that_steps_allow(certainty, steps):
    values = torch.randn(steps, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([50.0, 0.0, 0.0, 0.0])
    mean, error = means_and_errors(values, owners(4, 1))
    bound = chance(values, owners(4, 1), torch.ones(4, dtype=torch.bool), certainty)
    assert steps >= fewest_steps(certainty) and certainty < bound < float(mean[0] / error[0]) / 4


@pytest.mark.parametrize("steps", [2, 5, 8])
def test_with_fewer_steps_nothing_is_ever_beyond_chance(steps):
    one, among = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.bool)
    for seed in range(20):
        values = 1 + 0.01 * torch.randn(steps, 1, generator=torch.Generator().manual_seed(seed))
        assert chance(values, one, among, 3.0) == math.inf
    assert chance(torch.ones(10**4, 1), one, among, 4.1) == math.inf == fewest_steps(4.1)


def test_a_layer_that_is_not_a_number_leaves_the_others_alone():
    values = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    broken = torch.cat([values, torch.full((12, 8), torch.nan)], 1)
    mean, error = means_and_errors(broken, owners(24, 8))
    assert torch.equal(mean[:16], values.mean(0)) and torch.isfinite(error[:16]).all()
    assert math.isfinite(chance(broken, owners(24, 8), torch.ones(24, dtype=torch.bool), 3.0))


def test_the_fewest_steps_are_those_whose_patterns_can_be_so_rare():
    values = torch.ones(9, 1) + 0.01 * torch.arange(9)[:, None]  # the surest gain there can be
    one, among = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.bool)
    for steps in (2, 5, 8, 9):
        mean, error = means_and_errors(values[:steps], one)
        assert bool(mean / error > chance(values[:steps], one, among, 3.0)) == (steps >= fewest_steps(3.0))
    assert [fewest_steps(certainty) for certainty in (0.0, 1.0, 2.0, 3.0)] == [2, 2, 5, 9]


def test_no_gradient_at_all_is_no_gain_and_nothing_is_below_the_certainty():
    one, among = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.bool)
    assert chance(torch.zeros(12, 1), one, among, 3.0) == 3.0
    assert chance(torch.zeros(12, 1), one, among, 0.0) == 0.0


@pytest.mark.parametrize("steps", [11, 30])
def test_looking_at_fewer_patterns_changes_no_decision(steps, monkeypatch):
    generator, among = torch.Generator().manual_seed(0), torch.ones(24, dtype=torch.bool)
    sure, fewer = 0, 0
    for gain in torch.linspace(0, 1.2, 40):
        values = torch.randn(steps, 24, generator=generator)
        values[:, 0] += gain
        mean, error = means_and_errors(values, owners(24, 8))
        surest = float((mean / error).max())
        monkeypatch.setattr("pedyra.methods.pedyra.noise.CHUNK", 10**9)
        whole = chance(values, owners(24, 8), among, 2.0)
        monkeypatch.setattr("pedyra.methods.pedyra.noise.CHUNK", 24)  # one pattern at a time
        stopped = chance(values, owners(24, 8), among, 2.0)
        assert (surest > stopped) == (surest > whole)
        assert surest <= whole or stopped == whole  # what is beyond chance has been held against all patterns
        sure, fewer = sure + (surest > whole), fewer + (stopped != whole)
    assert 5 < sure < 35 and fewer > 5


def test_long_looks_draw_their_patterns_and_agree_with_all_of_them():
    generator = torch.Generator().manual_seed(0)
    values, among = torch.randn(11, 40, generator=generator), torch.ones(40, dtype=torch.bool)
    assert 2**11 == PATTERNS[0]
    every = chance(values, owners(40, 8), among, 2.0)
    again = torch.cat([values, torch.zeros(1, 40)])  # a step without gradients hardly changes a mean by its error
    assert chance(again, owners(40, 8), among, 2.0) == pytest.approx(every, rel=0.1)

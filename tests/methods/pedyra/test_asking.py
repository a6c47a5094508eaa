"""Questions on synthetic prefixes, whose cost is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pedyra.fitting.curve import Prefixes
from pedyra.fitting.gramians import Calibration, Measured
from pedyra.fitting.verdict import student
from pedyra.fitting.worth import Balance, predicted_costs
from pedyra.methods.pedyra.asking import LOOKS, Account, Asking, still_learning

RANKS = {"a": 8, "b": 4}


def calibration(learns: tuple[str, ...] = (), noise: float = 1.0, steps: int = 20) -> Calibration:
    """Directions worth 2^-i, and slopes that are noise but for layers that learn."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for index, (name, rank) in enumerate(RANKS.items()):
        values = torch.tensor([2.0 ** -(i + index) for i in range(rank)]).double()
        slopes = noise * torch.randn(steps, rank, generator=generator).double() * values
        eye = torch.eye(rank).double()
        layers[name] = Measured(Balance(eye, eye, values), slopes - (5.0 if name in learns else 0.0), 2.0, 10 + index)
    return Calibration(layers, torch.full((steps,), 4.0).double(), 0)


def quiet() -> Prefixes:
    """Sets whose slopes are next to nothing, so that what the losses say is all there is."""
    return Prefixes(calibration(noise=1e-6))


NONE = torch.zeros(13, dtype=torch.float64)
"""Slopes of a batch."""


def test_every_prefix_has_the_cost_of_its_summed_slopes():
    found = calibration()
    prefixes = Prefixes(found)
    one_more = {name: torch.diag(layer.slopes[3]).float() for name, layer in found.layers.items()}
    assert torch.allclose(prefixes.slopes_of(one_more), prefixes.slopes[3], atol=1e-6)
    assert len(prefixes.parameters) == 1 + 12 and prefixes.parameters[0] == 8 * 10 + 4 * 11
    for removals in (1, 5, 12):
        ranks = prefixes.ranks(removals)
        c: Tensor = sum(found.layers[n].slopes[:, k:].sum(1) for n, k in ranks.items())  # type: ignore[assignment]
        assert prefixes.predicted[removals] == pytest.approx(float(predicted_costs(c[:, None], found.samples)))
        assert prefixes.parameters[removals] == ranks["a"] * 10 + ranks["b"] * 11
    assert prefixes.parameters[12] == 0 and Prefixes(found, least=1).ranks(10) == {"a": 1, "b": 1}


def test_a_layer_that_learns_loses_nothing():
    found = calibration(learns=("a",))
    assert still_learning(found) == ["a"]
    prefixes = Prefixes(found, whole_layers=["a"])
    assert prefixes.ranks(4) == {"a": 8, "b": 0} and len(prefixes.parameters) == 1 + 4
    # Its eight gates slope by 5 each: 40 is less than its half of a tolerance of 100.
    assert still_learning(found, 100.0) == [] and still_learning(found, 50.0) == ["a"]


def answered(cost_of: dict[int, float], noise: float, tolerance: float = 0.1, batches: int = 200) -> Asking:
    """Ask until all is answered; removing n directions costs `cost_of[n]`, seen with noise."""
    generator = torch.Generator().manual_seed(1)
    asking = Asking(quiet(), tolerance, Account(batches), 124)
    while asking.question is not None:
        cost = cost_of[asking.question.removals]
        asking.tell(1.0, 1.0 + cost + noise * float(torch.randn((), generator=generator)), 4.0, NONE)
    return asking


@pytest.mark.parametrize("most", [3, 7, 10])
def test_the_most_that_may_go_is_found(most):
    asking = answered({n: 0.02 if n <= most else 1.0 for n in range(13)}, noise=0.01)
    parameters = asking.prefixes.parameters[asking.may_go]
    assert asking.may_go <= most
    assert parameters <= asking.prefixes.parameters[most] / 0.9 + 11  # nearer sets are not asked about
    assert asking.cost_of_it == pytest.approx(0.02, abs=0.01)


def test_what_noise_hides_is_not_let_go_and_the_batches_end():
    asking = answered(dict.fromkeys(range(13), 0.0), noise=5.0, batches=40)
    assert asking.may_go == 0 and asking.account.batches == 40
    assert all(point["answer"] == "open" for point in asking.account.points)


def test_a_costly_set_is_seldom_let_go():
    """Twice the tolerance, in noise as large: of 200 runs, at most the doubt that is allowed and its own noise."""
    wrong = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        asking = Asking(quiet(), 0.1, Account(64), 124)
        while asking.question is not None:
            asking.tell(1.0, 1.2 + 0.2 * float(torch.randn((), generator=generator)), 4.0, NONE)
        wrong += asking.may_go > 0
    assert wrong <= 10


def by_slopes(cost: float, seed: int, window: int = 60, mean: float = 0.0, falls: float = 0.0) -> Asking:
    """Every set costs `cost - mean`, and what a batch says of it is off by its slope, and by a twentieth of that.

    Args:
        mean: of slopes.
        falls: how much lower they are in the batches than in the window.
    """
    prefixes = Prefixes(calibration(noise=0.1, steps=window))
    generator = torch.Generator().manual_seed(seed)
    window_slopes = 0.1 * torch.randn(window, 13, generator=generator).double() + mean
    window_slopes[:, 0] = 0.0
    asking = Asking(prefixes, 0.1, Account(64), 124)
    asking.slopes = window_slopes
    while asking.question is not None:
        slopes = 0.1 * torch.randn(13, generator=generator).double() + mean - falls
        slope = float(slopes[asking.question.removals])
        asking.tell(1.0, 1.0 + cost - slope + 0.005 * float(torch.randn((), generator=generator)), 4.0, slopes)
    return asking


def test_slopes_of_the_steps_before_make_few_batches_enough():
    """A cost of half of the tolerance, in noise as large as it: 8 batches tell, of which 32 could not by themselves."""
    found = [by_slopes(0.05, seed).account.points[0] for seed in range(20)]
    early = [point for point in found if point["answer"] == "within" and point["batches"] == 8]
    assert len(early) >= 15
    # Of the mean slope over 60 steps and 8.
    assert all(point["standard_error"] == pytest.approx(0.1 / 68**0.5, rel=0.3) for point in early)
    assert max(point["measured_cost"] for point in early) < 0.1
    alone = 0.05 + student(0.05 / LOOKS, 32) * 0.1 / 32**0.5
    assert alone > 0.1


def test_what_a_set_still_gains_is_a_part_of_its_cost():
    costs = [by_slopes(0.02, seed, mean=-0.08).account.points[0]["measured_cost"] for seed in range(40)]
    assert sum(costs) / 40 == pytest.approx(0.10, abs=0.01)


def test_a_costly_set_is_seldom_let_go_by_its_slopes():
    assert sum(by_slopes(0.15, seed).may_go > 0 for seed in range(200)) <= 10


def test_slopes_that_fall_since_are_not_averaged_away():
    """The set is learning: its cost is 0.02 by the window's slopes, and 0.22 by those of now."""
    assert all(by_slopes(0.02, seed, falls=0.2).may_go == 0 for seed in range(20))


def test_looks_are_counted():
    account = Account(10_000, looks=LOOKS - 1)
    asking = Asking(quiet(), 0.1, account, 124)
    for _ in range(8):
        asking.tell(1.0, 1.5, 4.0, NONE)
    assert account.is_exhausted and asking.question is None
    assert [point["answer"] for point in account.points] == ["beyond"]


@pytest.mark.parametrize("steps", [0, 1])
def test_a_window_of_less_than_two_steps_asks_nothing(steps):
    assert Asking(Prefixes(calibration(steps=steps)), 0.1, Account(100), 124).question is None


def test_a_set_whose_slopes_are_too_noisy_to_prove_is_not_asked_about():
    """Of 20 steps the mean slope of one direction with noise of 1 is known to 1 / sqrt(20)."""
    asking = Asking(Prefixes(calibration()), 0.1, Account(100), 124)
    question = asking.question
    assert question is not None
    error = asking.slopes.std(0) / 20**0.5
    assert student(0.05 / LOOKS, 20) * error[question.removals] <= 0.1
    assert student(0.05 / LOOKS, 20) * error[question.removals + 1 :].min() > 0.1


def test_a_loss_that_is_not_finite_is_left_out():
    asking = Asking(quiet(), 0.1, Account(100), 124)
    asking.tell(1.0, float("nan"), 4.0, NONE)
    assert asking.question is not None and asking.question.samples == [] and len(asking.samples) == 20


def test_a_batch_that_tells_nothing_is_no_occasion_to_look_again():
    asking = Asking(quiet(), 0.1, Account(100), 124)
    for batch in range(8):
        asking.tell(1.0, 1.0 + 0.2 * (batch % 2), 4.0, NONE)
    asking.tell(1.0, float("nan"), 4.0, NONE)
    assert asking.question is not None and len(asking.question.samples) == 8 and asking.account.looks == 1


def test_a_run_that_ends_its_batches_lets_nothing_go_on_fewer_than_eight():
    """Two batches that happen to agree would have a standard error of next to nothing."""
    asking = Asking(quiet(), 0.1, Account(7), 124)
    for _ in range(7):
        asking.tell(1.0, 1.0, 4.0, NONE)
    assert asking.may_go == 0 and [point["answer"] for point in asking.account.points] == ["open"]


def test_the_bound_is_students():
    """Against tables of t: 0.995 with 7 degrees of freedom, 0.95 with 15, 0.975 with 31."""
    assert student(0.005, 8) == pytest.approx(3.499, rel=0.01)
    assert student(0.05, 16) == pytest.approx(1.753, rel=0.01)
    assert student(0.025, 32) == pytest.approx(2.040, rel=0.01)

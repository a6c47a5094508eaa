"""Sizes, shapes and the choice, by hand: two layers whose directions cost 8, 4 and 2 (price 10) and 9, 1 (price 20)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pedyra.fitting.curve import (
    Point,
    Shape,
    by_type,
    num_parameters,
    point,
    removal_order,
    sizes,
    whole,
    within,
)
from pedyra.fitting.gramians import Calibration, Measured
from pedyra.fitting.verdict import Tolerance, in_words, paired, run_verdict, smallest_within, verdict
from pedyra.fitting.worth import Balance

COSTS = {"q": (10, [8.0, 4.0, 2.0]), "block.up": (20, [9.0, 1.0])}


@pytest.fixture
def calibration() -> Calibration:
    layers = {}
    for name, (price, costs) in COSTS.items():
        values = (2 * torch.tensor(costs).double()).sqrt()  # n s^2 / 2 with n = 1
        eye = torch.eye(len(costs)).double()
        layers[name] = Measured(Balance(eye, eye, values), -torch.tensor([costs, costs]).double(), 1.0, price)
    return Calibration(layers, torch.tensor([4.0, 4.0]).double(), 0)


def ranks(points: list[Point]) -> list[tuple[int, int]]:
    return [(each.ranks["q"], each.ranks["block.up"]) for each in points]


def test_the_cheapest_per_parameter_goes_first(calibration):
    # Per parameter: q 0.8, 0.4, 0.2; up 0.45, 0.05.
    assert removal_order(calibration) == [("block.up", 1), ("q", 2), ("q", 1), ("block.up", 0), ("q", 0)]


def test_a_size_is_predicted_by_the_slopes_of_what_it_leaves_out(calibration):
    found = point(calibration, {"q": 1, "block.up": 2})
    assert found.parameters == 50 and found.share == 50 / 70
    assert found.predicted == 6.0  # slopes of -4 and -2 in both batches: no variance
    assert point(calibration, whole(calibration)).predicted == 0


def test_the_curve_has_the_largest_size_below_each_share_and_ends_with_one_direction(calibration):
    found = sizes(calibration, Shape(), shares=(0.75, 0.5, 0.0))
    assert ranks(found) == [(3, 2), (3, 1), (1, 1), (1, 0)]
    assert [each.parameters for each in found] == [70, 50, 30, 10]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (Shape(max_rank=1), [(1, 1), (1, 0)]),
        (Shape(same_rank=True), [(3, 2), (2, 2), (1, 1)]),
        (Shape(multiple_of=2), [(3, 2), (2, 2), (2, 0)]),
        (Shape(least=1), [(3, 2), (3, 1), (1, 1)]),
    ],
)
def test_a_shape_holds_at_every_size(calibration, shape, expected):
    assert ranks(sizes(calibration, shape, shares=(0.9, 0.75, 0.5, 0.0))) == expected


def test_module_types_can_be_emptied(calibration):
    found = sizes(calibration, Shape(drop=by_type(["up"], COSTS)), shares=(0.3, 0.0))
    assert ranks(found) == [(3, 0), (2, 0), (1, 0)]
    with pytest.raises(ValueError, match="drop_types names 'down', which no layer of the adapter has; it has q, up"):
        by_type(["down"], COSTS)


def test_the_largest_size_of_so_many_parameters(calibration):
    assert num_parameters(calibration, within(calibration, Shape(), 49).ranks) == 40
    with pytest.raises(ValueError, match="parameters is 9, but the smallest such adapter has 10; raise it"):
        within(calibration, Shape(), 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_rank": 0}, "max_rank is 0; a rank is at least 1"),
        ({"multiple_of": 0}, "multiple_of is 0; it must be at least 1"),
        ({"max_rank": 4, "multiple_of": 8}, "max_rank is 4, below multiple_of 8: no rank is left; raise max_rank"),
    ],
)
def test_shapes_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Shape(**settings)


def test_paired_differences_by_hand():
    """Differences 0.1 and 0.3 with weights 1 and 3: mean 0.25; sum of squares (0.15)^2 + (3 * 0.05)^2 = 0.045."""
    mean, error = paired([1.0, 1.0], [1.1, 1.3], [1.0, 3.0])
    assert mean == pytest.approx(0.25) and error == pytest.approx(math.sqrt(0.045 * 2) / 4)


def curve(*costs: tuple[float, float, float]) -> list[Point]:
    """(share, measured cost, standard error) of each size, of 1000 parameters."""
    return [
        Point(ranks={"q": round(1000 * share)}, parameters=round(1000 * share), share=share,
              predicted=0.0, measured=cost, standard_error=error)
        for share, cost, error in costs
    ]  # fmt: skip


LEARNED = Tolerance(won=1.0, won_standard_error=0.01, part=0.01)


def test_the_smallest_size_whose_upper_bound_is_within_tolerance_is_taken():
    sure = curve((1, 0, 0), (0.5, 0.001, 0.001), (0.25, 0.002, 0.001), (0.1, 0.002, 0.01))
    found = smallest_within(sure, LEARNED)
    assert found is not None and found.share == 0.25  # the last may cost 0.002 + 2.2 * 0.01
    assert (
        verdict(sure, LEARNED) == "flat" and in_words(sure, LEARNED, 8) == "flat: r = 8 is 4 times what this task needs"
    )
    assert smallest_within(curve((0.5, 0.02, 0.001)), LEARNED) is None


def test_nothing_below_the_first_size_beyond_tolerance_is_taken():
    """Else each of many sizes would have a chance of its own to look cheap."""
    lucky = curve((1, 0, 0), (0.5, 0.001, 0.001), (0.25, 0.012, 0.001), (0.1, 0.0, 0.001))
    found = smallest_within(lucky, LEARNED)
    assert found is not None and found.share == 0.5


def test_two_series_of_questions_share_the_doubt():
    """0.0042 + 1.645 * 0.0033 = 0.0096 is within 0.01 at 95 %; 0.0042 + 1.960 * 0.0033 = 0.0107 at 97.5 % is not."""
    one = curve((0.5, 0.0042, 0.0033))
    assert smallest_within(one, LEARNED) is not None
    assert smallest_within(one, replace(LEARNED, series=2)) is None


def test_few_batches_ask_for_more_certainty():
    """Student's t of 8 batches at 95 % is 1.895: 0.0042 + 1.895 * 0.0031 = 0.0101, where 1.645 gives 0.0093."""
    one = curve((0.5, 0.0042, 0.0031))
    assert smallest_within(one, LEARNED) is not None
    assert smallest_within(one, replace(LEARNED, batches=8)) is None


def test_a_size_that_costs_too_much_is_taken_in_one_of_twenty_curves_at_most():
    """0.01 may be given up; six sizes cost just more. If the smallest that looks cheap were taken it would be 26 %."""
    generator = torch.Generator().manual_seed(0)
    truth = [(0.9, 0.001), *((0.8 - index / 10, 0.0101) for index in range(6))]
    too_dear = 0
    for _ in range(2000):
        noise = (0.002 * torch.randn(7, generator=generator)).tolist()
        found = smallest_within(curve(*[(s, c + e, 0.002) for (s, c), e in zip(truth, noise, strict=True)]), LEARNED)
        too_dear += found is not None and found.share < 0.9
    assert 0.03 * 2000 < too_dear <= 0.05 * 2000 + 3 * math.sqrt(0.05 * 0.95 * 2000)


def test_a_rank_that_binds_is_told_with_what_twice_as_much_might_save():
    """Half costs 0.12, the next half 0.16 more: each doubling saves 3/4 of the one before, so the next 0.09."""
    binding = curve((1, 0, 0), (0.5, 0.12, 0.01), (0.25, 0.28, 0.01))
    assert verdict(binding, LEARNED) == "capacity-limited"
    words = in_words(binding, LEARNED, 8)
    assert words == (
        "capacity-limited: r = 8 binds; half of it would cost 0.12, twice as much might save about 0.09; raise r"
    )


def test_what_cannot_be_told_is_unknown():
    assert verdict(curve((1, 0, 0), (0.5, 0.01, 0.01)), LEARNED) == "unknown"
    nothing = Tolerance(won=0.001, won_standard_error=0.01, part=0.01)
    flat = curve((1, 0, 0), (0.1, 0, 0))
    assert smallest_within(flat, nothing) is None and verdict(flat, nothing) == "unknown"
    assert "everything is kept" in in_words(flat, nothing, 8)


def test_the_verdict_of_a_run_is_that_of_its_answers():
    answers = [("within", 0.9, 0.0), ("beyond", 0.3, 0.5), ("beyond", 0.6, 0.2)]
    points = [{"answer": answer, "share": part, "measured_cost": cost} for answer, part, cost in answers]
    binds = "capacity-limited: r = 8 binds; 60% of it would cost 0.2 of the loss; a higher r may save more"
    assert run_verdict(points, 0.25, 8, True) == ("flat", "flat: r = 8 is 4 times what this task needs")
    assert run_verdict(points, 0.0, 8, True) == ("flat", "flat: no rank is needed")
    assert run_verdict(points, 1.0, 8, True) == ("capacity-limited", binds)
    near = {"answer": "beyond", "share": 0.48, "measured_cost": 0.01}  # no set leaves just a half
    assert run_verdict([near], 0.63, 8, True)[0] == "capacity-limited"
    assert run_verdict([near | {"share": 0.4}], 0.63, 8, True)[0] == "unknown"
    assert run_verdict([], 1.0, 8, False)[1].startswith("unknown: the loss has not fallen beyond its noise")
    assert run_verdict(points[:1], 0.77, 8, False)[1].startswith("unknown: 77% is kept")  # by a window before
    kind, words = run_verdict(points[:2], 1.0, 8, True)
    assert kind == "unknown" and words.startswith("unknown: 100% is kept, and the batches do not tell")

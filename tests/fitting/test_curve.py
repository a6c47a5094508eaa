"""Sizes and shapes by hand: two layers whose directions are worth 8, 4 and 2 (10 parameters) and 9, 1 (20)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pedyra.fitting.curve import Ladder, num_parameters, point, removal_order, whole
from pedyra.fitting.gramians import Calibration, Measured
from pedyra.fitting.wanted import Shape, by_type
from pedyra.fitting.worth import Balance

WORTH = {"q": (10, [8.0, 4.0, 2.0]), "block.up": (20, [9.0, 1.0])}


@pytest.fixture
def calibration() -> Calibration:
    layers = {}
    for name, (parameters, worth) in WORTH.items():
        values = (2 * torch.tensor(worth).double()).sqrt()  # n s^2 / 2 with n = 1
        eye = torch.eye(len(worth)).double()
        slopes = -torch.tensor([worth, worth]).double()
        layers[name] = Measured(Balance(eye, eye, values), torch.diag_embed(slopes), 1.0, parameters)
    return Calibration(layers, torch.tensor([4.0, 4.0]).double(), 0)


def ranks(ladder: Ladder) -> list[tuple[int, int]]:
    points = [ladder.point(index) for index in range(len(ladder))]
    assert [each.parameters for each in points] == ladder.parameters
    return [(each.ranks["q"], each.ranks["block.up"]) for each in points]


def test_what_is_worth_least_per_parameter_goes_first(calibration):
    # Per parameter: q 0.8, 0.4, 0.2; up 0.45, 0.05.
    assert removal_order(calibration) == [("block.up", 1), ("q", 2), ("q", 1), ("block.up", 0), ("q", 0)]


def test_a_size_is_predicted_by_the_slopes_of_what_it_leaves_out(calibration):
    found = point(calibration, {"q": 1, "block.up": 2})
    assert found.parameters == 50 and found.share == 50 / 70
    assert found.predicted == 6.0  # slopes of -4 and -2 in both batches: no variance
    assert point(calibration, whole(calibration)).predicted == 0


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (Shape(), [(3, 2), (3, 1), (2, 1), (1, 1), (1, 0)]),
        (Shape(max_rank=1), [(1, 1), (1, 0)]),
        (Shape(same_rank=True), [(3, 2), (2, 2), (1, 1)]),
        (Shape(multiple_of=2), [(3, 2), (2, 2), (2, 0)]),
        (Shape(least=1), [(3, 2), (3, 1), (2, 1), (1, 1)]),
        (Shape(drop=by_type(["up"], WORTH)), [(3, 0), (2, 0), (1, 0)]),
    ],
    ids=["any", "max_rank", "same_rank", "multiple_of", "least", "drop"],
)
def test_every_size_has_the_shape_and_the_last_is_one_direction(calibration, shape, expected):
    assert ranks(Ladder(calibration, shape)) == expected


def test_the_largest_size_of_so_many_parameters_or_of_such_a_part(calibration):
    ladder = Ladder(calibration, Shape())
    assert num_parameters(calibration, ladder.point(ladder.within(49)).ranks) == 40
    assert [ladder.at(share) for share in (1, 0.99, 0.5, 0.0)] == [0, 1, 3, 4]
    assert [ladder.share(index) for index in (0, 3)] == [1, 30 / 70]
    with pytest.raises(ValueError, match="parameters is 9, but the smallest such adapter has 10; raise it"):
        ladder.within(9)


def test_the_part_that_a_size_has_is_that_size(calibration):
    """Whatever a float makes of the part: 41 / 50 * 50 is less than 41."""
    layer = calibration.layers["q"]
    eye, values = torch.eye(50).double(), torch.arange(50, 0, -1).double()
    wide = Measured(Balance(eye, eye, values), torch.diag_embed(layer.slopes[:, :1].expand(2, 50)), 1.0, 1)
    ladder = Ladder(replace(calibration, layers={"q": wide}), Shape())
    assert [ladder.at(ladder.share(index)) for index in range(len(ladder))] == [*range(len(ladder))]


def test_module_types_that_are_not_there_or_are_all_there_is_are_refused():
    with pytest.raises(ValueError, match="drop_types names 'down', which no layer of the adapter has; it has q, up"):
        by_type(["down"], WORTH)
    with pytest.raises(ValueError, match="drop_types names every layer"):
        by_type(["q", "up"], WORTH)


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


@st.composite
def calibrations(draw: st.DrawFn) -> Calibration:
    layers, generator = {}, torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    for name in draw(st.lists(st.sampled_from("qkvogud"), min_size=1, max_size=7, unique=True)):
        rank = draw(st.integers(1, 6))
        values = torch.rand(rank, generator=generator).double().sort(descending=True).values
        slopes = torch.randn(3, rank, generator=generator).double()
        parameters = draw(st.sampled_from([3, 7, 20]))
        layers[name] = Measured(
            Balance(torch.eye(rank), torch.eye(rank), values), torch.diag_embed(slopes), 5.0, parameters
        )
    return Calibration(layers, torch.tensor([4.0, 4.0, 2.0]), 0)


@given(st.data(), calibrations())
def test_any_size_has_the_shape_asked_for_and_is_the_largest_within(data, calibration):
    multiple, least = data.draw(st.sampled_from([1, 1, 2, 3])), data.draw(st.integers(0, 1))
    shape = Shape(max_rank=data.draw(st.sampled_from([None, 3, 4])), multiple_of=multiple, least=least)
    everything, ladder = whole(calibration), Ladder(calibration, shape)
    every = [ladder.point(index) for index in range(len(ladder))]
    for size in every:
        for name, rank in size.ranks.items():
            assert min(least, everything[name]) <= rank <= min(everything[name], shape.max_rank or 99)
            assert rank % multiple == 0 or rank == everything[name]
        assert size.parameters == num_parameters(calibration, size.ranks)
    assert [each.parameters for each in every] == ladder.parameters
    assert all(a.parameters > b.parameters for a, b in zip(every, every[1:], strict=False))
    budget = data.draw(st.integers(every[-1].parameters, num_parameters(calibration, everything)))
    found = every[ladder.within(budget)]
    assert found.parameters <= budget
    assert all(size.parameters <= found.parameters for size in every if size.parameters <= budget)

"""The adjustments of a run: the paper's own runs, and schedules in which nothing could happen."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pedyra.allocate.schedule import resolve_schedule


@pytest.mark.parametrize(
    ("total", "t_i", "delta", "t_f", "count"),
    [
        # Table 8: t_f read as the length of the final phase.
        (32765, 1000, 1000, 12765, 18),
        (31250, 1000, 1000, 11250, 18),
    ],
)
def test_the_papers_llama_runs_have_18_adjustments(total, t_i, delta, t_f, count):
    schedule = resolve_schedule(total, initial_warmup=t_i, interval=delta, final_warmup=t_f)
    assert len(schedule.adjustments) == count
    assert schedule.adjustments[0] == t_i + delta and schedule.adjustments[-1] == 19000


def test_adjustments_are_those_of_the_definition():
    for total, t_i, delta, t_f in [(100, 10, 5, 30), (50, 0, 7, 0), (20, 3, 1, 4), (101, 11, 13, 17)]:
        schedule = resolve_schedule(total, initial_warmup=t_i, interval=delta, final_warmup=t_f)
        expected = [t for t in range(1, total + 1) if t > t_i and (t - t_i) % delta == 0 and t < total - t_f]
        assert list(schedule.adjustments) == expected
        for step in range(1, total + 1):
            assert schedule.is_adjustment(step) == (step in expected)
            assert schedule.next_adjustment(step) == next((t for t in expected if t >= step), None)


def test_fractions_are_of_the_run_and_equal_the_same_steps():
    by_fraction = resolve_schedule(1000, initial_warmup=0.1, interval=0.05, final_warmup=0.3)
    assert by_fraction == resolve_schedule(1000, initial_warmup=100, interval=50, final_warmup=300)


def test_a_fraction_never_makes_an_interval_of_zero():
    assert resolve_schedule(10, initial_warmup=0.1, interval=0.01, final_warmup=0.3).interval == 1


@pytest.mark.parametrize(
    ("total", "settings"),
    [
        (100, dict(initial_warmup=60, interval=1, final_warmup=40)),
        (100, dict(initial_warmup=10, interval=200, final_warmup=10)),
        (6, dict(initial_warmup=0.0, interval=0.05, final_warmup=0.25, least_interval=4)),
        (2, dict(initial_warmup=0.06, interval=0.023, final_warmup=0.64)),
        (5, dict(initial_warmup=0.5, interval=0.4, final_warmup=3)),
        (1000, dict(initial_warmup=900, interval=0.05, final_warmup=0.2)),
        (1000, dict(initial_warmup=0.45, interval=30, final_warmup=0.54)),
    ],
)
def test_where_nothing_could_move_the_steps_that_would_be_enough_are_told(total, settings):
    """They really are, and one fewer is not."""

    def told(steps: int) -> str:
        with pytest.raises(ValueError, match=f"no rank could ever move: .* of {steps} ") as raised:
            resolve_schedule(steps, **settings)
        return str(raised.value)

    (enough,) = map(int, re.findall(r"train for (\d+) steps", told(total)))
    assert resolve_schedule(enough, **settings).adjustments
    told(enough - 1)


def test_where_the_warmups_fill_a_run_of_any_length_no_steps_are_told():
    with pytest.raises(ValueError, match="no rank could ever move: .*; shorten them$"):
        resolve_schedule(10_000_000, initial_warmup=0.6, interval=0.05, final_warmup=0.5)


def test_a_run_without_steps_is_refused():
    with pytest.raises(ValueError, match="total_steps is 0"):
        resolve_schedule(0, initial_warmup=0, interval=1, final_warmup=0)


def test_an_interval_below_the_least_is_refused_in_steps_and_raised_as_a_fraction():
    window: dict[str, Any] = dict(initial_warmup=0, final_warmup=0, least_interval=4)
    assert resolve_schedule(40, interval=0.05, **window).interval == 4
    assert resolve_schedule(40, interval=4, **window).interval == 4
    with pytest.raises(ValueError, match="interval is 3, but fewer than 4 steps"):
        resolve_schedule(40, interval=3, **window)

"""The adjustments of a run: the paper's own runs, and schedules in which nothing could happen."""

from __future__ import annotations

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
            assert (step in schedule.adjustments) == (step in expected)
            assert schedule.next_adjustment(step) == next((t for t in expected if t >= step), None)


def test_a_run_of_any_length_costs_the_same():
    schedule = resolve_schedule(10**15, initial_warmup=10, interval=10, final_warmup=10)
    assert schedule.next_adjustment(10**14 + 1) == 10**14 + 10
    assert 10**15 - 20 in schedule.adjustments and 10**15 - 10 not in schedule.adjustments


def test_fractions_are_of_the_run_and_equal_the_same_steps():
    by_fraction = resolve_schedule(1000, initial_warmup=0.1, interval=0.05, final_warmup=0.3)
    assert by_fraction == resolve_schedule(1000, initial_warmup=100, interval=50, final_warmup=300)


def test_a_fraction_never_makes_an_interval_of_zero():
    assert resolve_schedule(10, initial_warmup=0.1, interval=0.01, final_warmup=0.3).interval == 1


def test_a_run_without_steps_is_refused():
    with pytest.raises(ValueError, match="total_steps is 0"):
        resolve_schedule(0, initial_warmup=0, interval=1, final_warmup=0)


def test_an_interval_below_the_least_is_refused_in_steps_and_raised_as_a_fraction():
    window: dict[str, Any] = dict(initial_warmup=0, final_warmup=0, least_interval=4)
    assert resolve_schedule(40, interval=0.05, **window).interval == 4
    assert resolve_schedule(40, interval=4, **window).interval == 4
    with pytest.raises(ValueError, match="interval is 3, but fewer than 4 steps"):
        resolve_schedule(40, interval=3, **window)

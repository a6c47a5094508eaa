"""Short versions of the soaks, whose long ones research/reliability.md has the figures of."""

from __future__ import annotations

from kills import by_command, soak
from steps import growth, watch


def test_a_training_that_is_killed_and_resumed_ends_as_the_unbroken_one(tmp_path):
    assert soak(2, 3, tmp_path, ways=[(by_command, 1)]) == {"kills": 2, "trainings": 1, "equal": 1}


def test_adjustments_leave_nothing_behind_but_their_records(tmp_path):
    looks = watch(200, 16, tmp_path, places=6)
    assert looks[-1].adjustments == 16
    grown = growth(looks)
    assert grown["objects"] <= 16 and grown["files"] <= 0 and grown["threads"] <= 0

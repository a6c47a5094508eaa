"""Held-out rows: no group on both sides, the asked share, the same for the same seed."""

from __future__ import annotations

import pytest

from pedyra.app.tasks.sources import held_out, sample

ROWS = [{"text": str(i), "film": f"film-{i % 10}"} for i in range(200)]


def test_no_group_straddles_the_split():
    train, held = held_out(ROWS, 0.25, "film", seed=0)
    assert {row["film"] for row in train}.isdisjoint(row["film"] for row in held)
    assert sorted(map(str, train + held)) == sorted(map(str, ROWS))
    assert len(held) == 60  # groups of 20 until 50 rows are reached


def test_without_groups_the_share_is_exact_and_rows_keep_their_order():
    train, held = held_out(ROWS, 0.25, None, seed=0)
    assert len(held) == 50
    for side in (train, held):
        assert [int(row["text"]) for row in side] == sorted(int(row["text"]) for row in side)


def test_the_seed_alone_decides():
    assert held_out(ROWS, 0.25, "film", seed=1) == held_out(ROWS, 0.25, "film", seed=1)
    assert held_out(ROWS, 0.25, "film", seed=1) != held_out(ROWS, 0.25, "film", seed=2)


def test_one_group_cannot_be_split():
    rows = [{"film": "a"}] * 5
    with pytest.raises(ValueError, match="0.5 of 1 values of data.group_by film leaves an empty side"):
        held_out(rows, 0.5, "film", seed=0)
    with pytest.raises(ValueError, match="of 1 rows leaves an empty side"):
        held_out(rows[:1], 0.5, None, seed=0)


def test_a_sample_is_drawn_without_repetition_and_never_larger_than_the_rows():
    drawn = sample(ROWS, 30, seed=0, side="training")
    assert len({row["text"] for row in drawn}) == 30
    assert sample(ROWS, 500, seed=0, side="training") == sample(ROWS, None, seed=0, side="training") == ROWS
    with pytest.raises(ValueError, match="the validation rows of data.source are empty"):
        sample([], None, seed=0, side="validation")

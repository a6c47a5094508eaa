"""Which rows are trained on and which are held out."""

from __future__ import annotations

from random import Random
from typing import Any

Rows = list[dict[str, Any]]
"""A data set in memory: one dict a row, column name to value."""


def held_out(rows: Rows, fraction: float, group_by: str | None, seed: int) -> tuple[Rows, Rows]:
    """Training and validation rows; rows with the same value of `group_by` stay on one side.

    Groups are held out in random order until they hold `fraction` of the rows. Raises ValueError if a side is empty.
    """
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row[group_by] if group_by else index, []).append(index)
    members = list(groups.values())
    Random(seed).shuffle(members)
    held: set[int] = set()
    for group in members:
        if len(held) >= fraction * len(rows):
            break
        held.update(group)
    train = [row for index, row in enumerate(rows) if index not in held]
    if not rows:
        raise ValueError("the data holds no rows; check data.source")
    if not train or not held:
        what = f"{len(groups)} values of data.group_by {group_by}" if group_by else f"{len(rows)} rows"
        raise ValueError(
            f"data.validation_fraction {fraction} of {what} leaves an empty side; give more rows or data.validation"
        )
    return train, [rows[index] for index in sorted(held)]


def sample(rows: Rows, count: int | None, seed: int, side: str) -> Rows:
    """`count` of the rows in their order, drawn with `seed`; all of them if there are no more. Raises if none."""
    if not rows:
        raise ValueError(f"the {side} rows of data.source are empty; a run needs at least one")
    if count is None or count >= len(rows):
        return rows
    return [rows[index] for index in sorted(Random(seed).sample(range(len(rows)), count))]

"""What a run found of its adapter's size, as a verdict of one word and a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pedyra.fit.verdict import CAPACITY_LIMITED, FLAT, UNKNOWN


def verdict(points: Sequence[Mapping[str, Any]], share: float) -> str:
    """flat: half of the parameters or less is enough. capacity-limited: half clearly costs more than tolerance.
    unknown: neither can be told.

    Args:
        points: `Account.points`.
        share: of the parameters at the start, that is left.
    """
    if share <= 0.5:
        return FLAT
    too_small = [point for point in points if point["answer"] == "beyond" and point["share"] >= 0.5]
    return CAPACITY_LIMITED if too_small else UNKNOWN


def in_words(points: Sequence[Mapping[str, Any]], share: float, rank: int, learned: bool) -> str:
    """The verdict for whoever chose this rank."""
    kind = verdict(points, share)
    if not learned:
        return "unknown: the loss has not fallen beyond its noise, so nothing tells what is needed; everything is kept"
    if kind == FLAT:
        return f"flat: r = {rank} is {1 / share:.2g} times what this task needs" if share else "flat: no rank is needed"
    if kind == CAPACITY_LIMITED:
        point = max((p for p in points if p["answer"] == "beyond"), key=lambda p: p["share"])
        return (
            f"capacity-limited: r = {rank} binds; {point['share']:.0%} of it would cost {point['measured_cost']:.2g} "
            f"of the loss; a higher r may save more"
        )
    return (
        f"unknown: {share:.0%} is kept, and the batches do not tell whether less would do; train longer, or raise the "
        f"tolerance"
    )

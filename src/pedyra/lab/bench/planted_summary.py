"""What the rows of `pedyra bench planted` say: each method's mean error, by the oracle's and by LoRA's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pedyra.lab.bench.rate_summary import aligned, best_rate
from pedyra.lab.compare.statistics import mean, standard_error

Group = tuple[str, int, int, str, float]
"""Architecture, width, depth, profile, noise."""


@dataclass(frozen=True)
class MethodSummary:
    """One method on one profile at one noise, at the learning rate with its lowest mean."""

    method: str
    lr: float
    errors: tuple[float, ...]
    """Relative error of each seed, infinite where the run diverged."""
    rank_distance: float | None
    seconds: float
    to_oracle: float | None
    """Mean error by the oracle's; None without one."""
    to_lora: float | None

    @property
    def error(self) -> float:
        """The mean over the seeds."""
        return mean(self.errors)


def summarise_planted(rows: Sequence[Mapping[str, Any]]) -> dict[Group, list[MethodSummary]]:
    """A summary per method for every group, both in the order of the rows."""
    groups: dict[Group, dict[str, dict[float, list[Mapping[str, Any]]]]] = {}
    for row in rows:
        group = (row["architecture"], row["width"], row["depth"], row["profile"], row["noise"])
        by_rate = groups.setdefault(group, {}).setdefault(row["method"], {})
        by_rate.setdefault(row["lr"], []).append(row)
    return {group: _summaries(methods) for group, methods in groups.items()}


def _summaries(methods: Mapping[str, Mapping[float, Sequence[Mapping[str, Any]]]]) -> list[MethodSummary]:
    chosen, rates = {}, {}
    for method, by_rate in methods.items():
        rates[method] = best_rate({lr: {row["seed"]: _error(row) for row in rows} for lr, rows in by_rate.items()})
        chosen[method] = by_rate[rates[method]]

    def ratio(method: str, reference: str) -> float | None:
        if reference not in chosen:
            return None
        return mean([_error(row) for row in chosen[method]]) / mean([_error(row) for row in chosen[reference]])

    return [
        MethodSummary(
            method=method,
            lr=rates[method],
            errors=tuple(_error(row) for row in rows),
            rank_distance=None if rows[0]["rank_distance"] is None else mean([row["rank_distance"] for row in rows]),
            seconds=mean([row["seconds"] for row in rows]),
            to_oracle=ratio(method, "oracle"),
            to_lora=ratio(method, "lora"),
        )
        for method, rows in chosen.items()
    ]


def _error(row: Mapping[str, Any]) -> float:
    return math.inf if row["relative_error"] is None else row["relative_error"]


def title(group: Group) -> str:
    """What is the same for a table."""
    architecture, width, depth, profile, noise = group
    return f"{profile}, noise {noise:g} ({architecture}, {depth} layers of width {width})"


def table(summaries: Sequence[MethodSummary]) -> list[str]:
    """Lines for a terminal."""
    rows = [["method", "error", "s.e.", "x oracle", "x lora", "ranks wrong", "lr", "seeds", "seconds"]]
    for summary in summaries:
        error = standard_error(summary.errors)
        rows.append(
            [
                summary.method,
                f"{summary.error:.3g}",
                "" if error is None else f"{error:.2g}",
                *("" if ratio is None else f"{ratio:.3g}" for ratio in (summary.to_oracle, summary.to_lora)),
                "" if summary.rank_distance is None else f"{summary.rank_distance:.1f}",
                f"{summary.lr:g}",
                str(len(summary.errors)),
                f"{summary.seconds:.1f}",
            ]
        )
    return aligned(rows)

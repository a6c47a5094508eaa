"""Methods over a grid of learning rates: each at its best rate, against a baseline at its own, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pedyra.lab.compare.statistics import compare_paired, standard_error

Losses = Mapping[float, Mapping[int, float]]
"""Learning rate -> seed -> loss, infinite where the run diverged."""


def rates_by_method(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[float, dict[int, float]]]:
    """Rows with `method`, `lr`, `seed` and `loss` (None: diverged) -> the losses of each method.

    Of a method whose settings changed, as `config` tells, only the rows of its last ones count.
    """
    methods: dict[str, dict[float, dict[int, float]]] = {}
    last = {row["method"]: row.get("config") for row in rows}
    for row in rows:
        if row.get("config") == last[row["method"]]:
            loss = math.inf if row["loss"] is None else row["loss"]
            methods.setdefault(row["method"], {}).setdefault(row["lr"], {})[row["seed"]] = loss
    return methods


def best_rate(losses: Losses) -> float:
    """The rate with the lowest mean, of those that have the most seeds; the lowest of equal ones."""
    most = max(map(len, losses.values()))
    full = [lr for lr in sorted(losses) if len(losses[lr]) == most]
    return min(full, key=lambda lr: fmean(list(losses[lr].values())))


def summarise_rates(methods: Mapping[str, Losses], baseline: str = "lora") -> list[dict[str, Any]]:
    """A line per method, in the order given: its mean loss at each rate, its best rate, the mean and standard error
    there, the paired `difference` to the baseline at its own best rate, and `edge` where the best ends the grid.

    The best rate is chosen from the very runs that are then compared, which flatters every method a little, those
    with more rates a little more: give all of them the same grid.
    """
    rates = sorted({lr for losses in methods.values() for lr in losses})
    lines = []
    for name, losses in methods.items():
        best = best_rate(losses)
        values = list(losses[best].values())
        line: dict[str, Any] = {"method": name}
        line |= {f"{lr:g}": fmean(list(losses[lr].values())) if lr in losses else None for lr in rates}
        line |= {"best lr": best, "seeds": len(values), "loss": fmean(values), "error": standard_error(values)}
        edge = "lowest" if best == min(losses) else "highest" if best == max(losses) else ""
        line |= {"edge": edge if len(losses) > 1 else "", "less lora": None, "95 %": None}
        if name != baseline and baseline in methods:
            difference = compare_paired(losses[best], methods[baseline][best_rate(methods[baseline])])
            if difference is not None:
                line |= {"less lora": difference.mean, "95 %": difference.interval}
        lines.append(line)
    return lines


def shown(value: Any) -> str:
    """A value of a line as text."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return " ".join(f"{end:+.4f}" for end in value)
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else "diverged"
    return str(value)

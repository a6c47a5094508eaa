"""The tables of the docs that a marker names, and the raw rows in docs/results that they are made of."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from pedyra.lab.compare.statistics import bootstrap_interval, standard_error

DOCS = Path(__file__).parents[1] / "docs"
Rows = list[dict[str, Any]]
TASKS = {"SST-2": "sst2", "QNLI": "qnli", "MRPC": "mrpc", "CoLA": "cola"}
Reported = dict[tuple[str, str, str], dict[str, dict[int, dict[str, Any]]]]


@cache
def raw(name: str) -> Rows:
    return [json.loads(line) for line in (DOCS / "results" / f"{name}.jsonl").read_text().splitlines()]


def words(page: str) -> str:
    """The text of a page on one line."""
    return " ".join((DOCS / f"{page}.md").read_text().split())


def table(marker: str, page: str = "results") -> list[dict[str, str]]:
    """The rows of the table below `<!-- marker -->`, by column."""
    _, found, below = (DOCS / f"{page}.md").read_text().partition(f"<!-- {marker} -->\n")
    assert found, marker
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in below.split("\n\n")[0].splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def difference(better: list[float], digits: int = 4) -> str:
    """Mean and interval of how much better a method is than LoRA, seed by seed."""
    if not any(better):
        return "0 in every run"
    interval = bootstrap_interval(better)
    assert interval is not None
    middle, low, high = (f"{value:+.{digits}f}" for value in (mean(better), *interval))
    return f"{middle} [{low}, {high}]"


def points(better: list[float]) -> str:
    """The same in points of a metric."""
    return difference(better, digits=1)


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {standard_error(values):.1f}"


def short(error: float) -> str:
    return f"{error:.5f}" if error < 0.01 else f"{error:.3f}"


@cache
def minilm() -> Reported:
    """(task, steps, r) -> method -> seed -> row."""
    found: Reported = defaultdict(lambda: defaultdict(dict))
    for row in raw("minilm"):
        if row["kind"] == "reported":
            case = (row["task"], str(row["steps"]), str(row["budget"]))
            assert row["seed"] not in found[case][row["method"]], row
            found[case][row["method"]][row["seed"]] = row
    return found

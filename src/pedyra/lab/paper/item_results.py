"""What was measured of an item, beside what was published: rows for JSON, tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pedyra.lab.compare.statistics import compare_paired, interval, standard_error
from pedyra.lab.compare.tables import NOTHING, TextTable
from pedyra.lab.paper.item import Item, Scale

Values = Mapping[tuple[str, str], Mapping[int, float]]
"""(row, column) -> seed -> value, in the published unit."""


@dataclass(frozen=True)
class Result:
    """One row x column."""

    id: str
    row: str
    column: str
    published: float | None
    values: dict[int, float]
    """By seed; empty where nothing was measured."""
    scale: Scale

    @property
    def measured(self) -> float | None:
        return fmean(self.values.values()) if self.values else None

    @property
    def standard_error(self) -> float | None:
        return standard_error(list(self.values.values()))

    @property
    def interval(self) -> tuple[float, float] | None:
        return interval(list(self.values.values()))

    def as_row(self) -> dict[str, Any]:
        """For JSON."""
        low, high = self.interval or (None, None)
        return {
            "id": self.id,
            "row": self.row,
            "column": self.column,
            "published": self.published,
            "measured": self.measured,
            "standard_error": self.standard_error,
            "interval_low": low,
            "interval_high": high,
            "seeds": len(self.values),
            "scale": self.scale,
            "values": {str(seed): value for seed, value in self.values.items()},
        }


def results(item: Item, scale: Scale, values: Values) -> list[Result]:
    """Every row x column of the item, with averages over the columns that were measured."""
    found = []
    for row in item.rows:
        for column, part in item.columns.items():
            mine = dict(values.get((row, column), {}))
            if part.average:
                mine = _average([values[row, name] for name in part.over or item.columns if (row, name) in values])
            found.append(Result(item.id, row, column, item.value(row, column), mine, scale))
    return found


def _average(columns: list[Mapping[int, float]]) -> dict[int, float]:
    """By the seeds that all columns have."""
    seeds = [seed for seed in columns[0] if all(seed in column for column in columns)] if columns else []
    return {seed: fmean(column[seed] for column in columns) for seed in seeds}


def result_tables(item: Item, scale: Scale, found: Sequence[Result]) -> list[TextTable]:
    """The values, and the differences between rows."""
    differences = difference_table(item, scale, found)
    return [result_table(item, scale, found), *([differences] if differences else [])]


def result_table(item: Item, scale: Scale, found: Sequence[Result]) -> TextTable:
    """Rows x columns of the item; each cell what was measured, and what was published in parentheses."""
    cells = {(result.row, result.column): _text(result) for result in found}
    counts = sorted({len(result.values) for result in found if result.values}) or [0]
    seeds = "one seed" if counts == [1] else f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds"
    return TextTable(
        title=f"{item.id}: {item.title}",
        rows=[{"": row} | {column: cells[row, column] for column in item.columns} for row in item.rows],
        note=f"Measured at scale {scale}: mean ± standard error, {seeds} [95 % interval]; in parentheses: published. "
        "The paper gives no spread.",
    )


def difference_table(item: Item, scale: Scale, found: Sequence[Result]) -> TextTable | None:
    """How far each row is from the first of its group; where each row is a task of its own, how far each column is
    from the first. None where nothing can be compared."""
    cells = {(result.row, result.column): result for result in found}
    first: dict[tuple[str, str | None], str] = {}
    for row in item.rows:
        first.setdefault(_group(item, row), row)
    others = {row: first[_group(item, row)] for row in item.rows if row != first[_group(item, row)]}
    if others:
        to = ", ".join(dict.fromkeys(others.values()))
        pairs = {row: {c: (cells[row, c], cells[other, c]) for c in item.columns} for row, other in others.items()}
    elif len(item.columns) > 1 and all(part.metric for part in item.rows.values()):  # columns are settings of a method
        to, *columns = item.columns
        pairs = {row: {c: (cells[row, c], cells[row, to]) for c in columns} for row in item.rows}
    else:
        return None
    return TextTable(
        title=f"Difference to {to}",
        rows=[{"": row} | {c: _difference(*pair) for c, pair in each.items()} for row, each in pairs.items()],
        note=f"Measured at scale {scale}: mean of the differences, paired by seed [Student's 95 % interval]; in "
        "parentheses: published.",
    )


def _group(item: Item, row: str) -> tuple[str, str | None]:
    """Rows that are compared have it in common: their group, or "LLaMA2-7B" of "LLaMA2-7B, DoRA", and the task."""
    part = item.rows[row]
    return part.group or row.rpartition(", ")[0], part.recipe


def _difference(ours: Result, theirs: Result) -> str:
    published = ""
    if ours.published is not None and theirs.published is not None:
        published = f" ({ours.published - theirs.published:+.4g})"
    difference = compare_paired(ours.values, theirs.values)
    if difference is None:
        return f"{NOTHING}{published}"
    ends = "" if difference.interval is None else " [{}, {}]".format(*map(number, difference.interval))
    return f"{'+' if difference.mean > 0 else ''}{number(difference.mean)}{ends}{published}"


def remarks(item: Item, scale: Scale, found: Sequence[Result]) -> list[str]:
    """The claim, what is not as published at this scale, and what is to be known of the published numbers."""
    told = [f"The paper's claim: {item.claim}"]
    if scale != "full":
        recipes = ", ".join(dict.fromkeys(item.scales[scale].recipes.values()))
        told.append(f"Scale {scale} has other models, data and steps ({recipes}): compare rows, not levels.")
    unmeasured = [column for column in item.columns if not any(r.values for r in found if r.column == column)]
    if unmeasured:
        told.append(f"Not measured: {', '.join(unmeasured)}.")
        if any(part.average for part in item.columns.values()):
            told.append("Measured averages are over the measured columns.")
    return told + item.notes


def _text(result: Result) -> str:
    published = "" if result.published is None else f" ({result.published:.10g})"
    if result.measured is None:
        return f"{NOTHING}{published}"
    text = number(result.measured)
    if result.standard_error is not None and result.interval is not None:
        low, high = map(number, result.interval)
        text += f" ± {number(result.standard_error)} [{low}, {high}]"
    return text + published


def number(value: float) -> str:
    """Two decimals from 1 on, four significant digits below."""
    return f"{value:,.2f}" if abs(value) >= 1 or value == 0 else f"{value:.4g}"

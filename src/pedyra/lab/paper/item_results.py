"""Measured and published numbers of an item, as rows for JSON and as tables for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pedyra.lab.compare.statistics import differences, interval, standard_error
from pedyra.lab.compare.tables import NOTHING, TextTable
from pedyra.lab.paper.item import Item, Scale, get_item

CellRow = dict[str, Any]
"""A line of the JSON file, for one row x column of an item; `result_row` makes it."""


def result_row(
    item: Item, scale: Scale, row: str, column: str, values: Mapping[int, float], learning_rate: float | None
) -> CellRow:
    """Return the published number and the measured mean, with its standard error and 95 % interval over the seeds of
    `values`; without any they are None. The learning rate of an average over tasks is None."""
    numbers = list(values.values())
    low, high = interval(numbers) or (None, None)
    return {
        "id": item.id,
        "row": row,
        "column": column,
        "published": item.value(row, column),
        "measured": fmean(numbers) if numbers else None,
        "standard_error": standard_error(numbers),
        "interval_low": low,
        "interval_high": high,
        "seeds": len(numbers),
        "scale": scale,
        "learning_rate": learning_rate,
        "values": {str(seed): value for seed, value in values.items()},
    }


def results(
    item: Item,
    scale: Scale,
    values: Mapping[tuple[str, str], Mapping[int, float]],
    rates: Mapping[tuple[str, str], float],
) -> list[CellRow]:
    """Return every row x column of the item, from (row, column) -> seed -> value in the published unit. An average is
    over the columns that all measured rows have, so that rows are compared over the same tasks."""
    cells = []
    for row in item.rows:
        for column, part in item.columns.items():
            mine = dict(values.get((row, column), {}))
            if part.average:
                over = part.over or item.columns
                rows = [each for each in item.rows if any((each, name) in values for name in over)]
                shared = [name for name in over if all((each, name) in values for each in rows)]
                mine = _average([values[row, name] for name in shared]) if row in rows else {}
            cells.append(result_row(item, scale, row, column, mine, rates.get((row, column))))
    return cells


def _average(columns: list[Mapping[int, float]]) -> dict[int, float]:
    """Average over the columns, for each of the seeds that all of them have."""
    seeds = [seed for seed in columns[0] if all(seed in column for column in columns)] if columns else []
    return {seed: fmean(column[seed] for column in columns) for seed in seeds}


def result_tables(item: Item, scale: Scale, cells: Sequence[CellRow]) -> list[TextTable]:
    """Return the values, and the differences between rows."""
    between_rows = difference_table(item, scale, cells)
    return [result_table(item, scale, cells), *([between_rows] if between_rows else [])]


def result_table(item: Item, scale: Scale, cells: Sequence[CellRow]) -> TextTable:
    """Return rows x columns; a cell has the measured number, and the published one in parentheses."""
    texts = {(each["row"], each["column"]): _text(each) for each in cells}
    counts = sorted({each["seeds"] for each in cells if each["seeds"]}) or [0]
    seeds = "one seed" if counts == [1] else f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds"
    return TextTable(
        title=f"{item.id}: {item.title}",
        rows=[{"": row} | {column: texts[row, column] for column in item.columns} for row in item.rows],
        note=f"Measured at scale {scale}: mean ± standard error, {seeds} [95 % interval]{_published(item)}",
    )


def difference_table(item: Item, scale: Scale, cells: Sequence[CellRow]) -> TextTable | None:
    """Return the difference of each row to the first of its group; where each row is a task, of each column to the
    baseline. None where nothing can be compared."""
    by_place = {(each["row"], each["column"]): each for each in cells}
    first = {_group(item, row): row for row in reversed(item.rows)}
    others = {row: first[_group(item, row)] for row in item.rows if row != first[_group(item, row)]}
    if others:
        to = ", ".join(dict.fromkeys(others.values()))
        pairs = {
            row: {c: (by_place[row, c], by_place[other, c]) for c in item.columns} for row, other in others.items()
        }
    elif len(item.columns) > 1 and all(part.metric for part in item.rows.values()):  # columns are settings of a method
        to = item.baseline if item.baseline in item.columns else next(iter(item.columns))
        columns = [each for each in item.columns if each != to]
        pairs = {row: {c: (by_place[row, c], by_place[row, to]) for c in columns} for row in item.rows}
    else:
        return None
    return TextTable(
        title=f"Difference to {to}",
        rows=[{"": row} | {c: _difference(*pair) for c, pair in each.items()} for row, each in pairs.items()],
        note=f"Measured at scale {scale}: mean of the differences, paired by seed [Student's 95 % interval]"
        f"{_published(item)}",
    )


def _published(item: Item) -> str:
    return "; in parentheses: published. The paper gives no spread." if item.published else "."


def _group(item: Item, row: str) -> tuple[str, str | None]:
    """Return what compared rows share: their group, or "LLaMA2-7B" of "LLaMA2-7B, DoRA", and the task."""
    part = item.rows[row]
    return part.group or row.rpartition(", ")[0], part.recipe


def _difference(ours: CellRow, theirs: CellRow) -> str:
    pair = ours["published"], theirs["published"]
    published = "" if None in pair else f" ({pair[0] - pair[1]:+.4g})"
    values = differences(ours["values"], theirs["values"])
    if not values:
        return f"{NOTHING}{published}"
    mean, between = fmean(values), interval(values)
    ends = "" if between is None else " [{}, {}]".format(*map(_number, between))
    return f"{'+' if mean > 0 else ''}{_number(mean)}{ends}{published}"


def remarks(item: Item, scale: Scale, cells: Sequence[CellRow]) -> list[str]:
    """List the claim, the differences to the published setting at this scale, and other remarks."""
    lines = [f"The paper's claim: {item.claim}"]
    if scale == "smoke":
        lines.append(
            "Scale smoke shows that the commands work. Its tiny random models learn nothing: no method is better."
        )
    elif scale != "full":
        recipes = ", ".join(dict.fromkeys(item.scales[scale].recipes.values()))
        lines.append(f"Scale {scale} has other models, data and steps ({recipes}): compare rows, not levels.")
    gaps = [column for column in item.columns if not any(each["seeds"] for each in cells if each["column"] == column)]
    if gaps:
        lines.append(f"Not measured: {', '.join(gaps)}.")
    columns = {each["column"] for each in cells if each["seeds"]}
    published = [name for name, part in get_item(item.id).columns.items() if not part.average]
    if any(part.average and not columns.issuperset(part.over or published) for part in item.columns.values()):
        lines.append("Measured averages are over the measured columns.")
    return lines + item.notes


def _text(row: CellRow) -> str:
    published = "" if row["published"] is None else f" ({row['published']:.10g})"
    if row["measured"] is None:
        return f"{NOTHING}{published}"
    text = _number(row["measured"])
    if row["standard_error"] is not None:
        low, high = _number(row["interval_low"]), _number(row["interval_high"])
        text += f" ± {_number(row['standard_error'])} [{low}, {high}]"
    return text + published


def _number(value: float) -> str:
    """Write two decimals from 1 on, and four significant digits below."""
    if not math.isfinite(value):
        return "diverged"
    return f"{value:,.2f}" if abs(value) >= 1 or value == 0 else f"{value:.4g}"

"""The tables of a comparison, and how tables are written: Markdown, LaTeX, CSV, and on the screen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
from rich.console import Console

from pedyra.app.console import format_bytes, format_seconds, print_table, write_json_lines
from pedyra.lab.compare.results import Comparison, sign
from pedyra.lab.compare.statistics import mean, standard_error
from pedyra.lora.files import write_file

Texts = dict[str, str]
"""A row of a table: column -> text. The first column names the row."""

NOTHING = "–"
MARKS = {"best": " *", "tied": " ="}
"""Of a value that is the best of its column by every interval, and of one that no interval tells from the best."""


@dataclass(frozen=True)
class Table:
    """What a reader sees; numbers are texts, for what a cell says of them is decided before."""

    title: str
    rows: Sequence[Texts]
    note: str = ""

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0])


def write_tables(stem: Path, title: str, tables: Sequence[Table], remarks: Sequence[str]) -> list[Path]:
    """`stem`.md with every table, its note, and the remarks as a list; `stem`.tex, which needs booktabs."""
    parts, latex = [f"# {title}"], [f"% {remark}" for remark in remarks]
    for table in tables:
        lines = [table.columns, [":--"] + ["--:"] * (len(table.columns) - 1), *(row.values() for row in table.rows)]
        shown = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        parts += [f"## {table.title}", shown, *([table.note] if table.note else [])]
        alignment = "l" + "r" * (len(table.columns) - 1)
        text = pandas.DataFrame(table.rows).to_latex(index=False, escape=True, column_format=alignment)
        latex.append(f"% {table.title}. {table.note}\n{text}")
    if remarks:
        parts += ["## Remarks", "\n".join(f"- {remark}" for remark in remarks)]
    files = {".md": "\n\n".join(parts) + "\n", ".tex": "\n".join(latex)}
    for suffix, text in files.items():
        write_file(stem.with_suffix(suffix), text)
    return [stem.with_suffix(suffix) for suffix in files]


def write_rows(stem: Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """`stem`.csv and `stem`.jsonl, numbers unrounded; what is nested has a column for each part in the former."""
    csv, lines = stem.with_suffix(".csv"), stem.with_suffix(".jsonl")
    pandas.json_normalize([dict(row) for row in rows]).to_csv(csv, index=False)
    write_json_lines(lines, rows)
    return [csv, lines]


def print_tables(console: Console, tables: Iterable[Table]) -> None:
    """Every table with its note."""
    for table in tables:
        print_table(console, table.columns, [list(row.values()) for row in table.rows], title=table.title)
        console.print(f"{table.note}\n", style="dim", soft_wrap=not console.is_terminal)


def number(value: float, *, signed: bool = False) -> str:
    """Four decimals below 10, two above."""
    return format(value, ("+" if signed else "") + (".4f" if abs(value) < 10 else ".2f"))


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Values and what they take, then differences, for each budget; then the learning-rate curves."""
    found = []
    for budget in comparison.grid.all_budgets:
        found.append(_values_table(comparison, budget))
        if comparison.grid.judge == "loss":
            found.append(_metrics_table(comparison, budget))
        if len(comparison.grid.methods) > 1:
            found.append(_differences_table(comparison, budget))
    return [*found, *([_curves_table(comparison)] if comparison.curves else [])]


def _values_table(comparison: Comparison, budget: int) -> Table:
    grid = comparison.grid
    standings = {task: comparison.standing(task, budget) for task in grid.tasks}
    shown: dict[str, tuple[str, Callable[[float], str]]] = {
        "parameters": ("trainable_parameters", lambda count: f"{count:,.0f}"),
        "time": ("seconds", format_seconds),
        "peak memory": ("peak_memory_bytes", format_bytes),
    }
    if any(result.fit_parameters is not None for result in comparison.results):
        shown["left by fit"] = ("fit_parameters", lambda count: f"{count:,.0f}")
        shown["loss increase"] = ("fit_increase", lambda increase: number(increase, signed=True))
    rows = []
    for method in grid.methods:
        row = {"method": method}
        for task in grid.tasks:
            mark = MARKS.get(standings[task].get(method, ""), "")
            row[_task_title(comparison, task)] = _value(comparison, method, task, budget) + mark
        for title, (key, text) in shown.items():
            cost = comparison.mean_of(key, method, budget)
            row[title] = NOTHING if cost is None else text(cost)
            ratio = None if key.startswith("fit") else comparison.ratio(key, method, budget)
            if ratio is not None:
                row[title] += f" ({ratio:.2f}×)"
        rows.append(row)
    return Table(
        title=f"{grid.name}: budget r = {budget}, equal {grid.match}",
        rows=rows,
        note=f"Mean ± standard error over seeds {_listed(grid.seeds)}.{MARKS['best']}: best, with the paired 95 % "
        f"interval to every other row clear of zero;{MARKS['tied']}: tied, no interval tells it from the best. Factors "
        f"are relative to {comparison.reference}. Grid {grid.fingerprint()}.",
    )


def _metrics_table(comparison: Comparison, budget: int) -> Table:
    """The tasks' own metrics, where the loss is judged: without standings, for nothing was chosen by them."""
    grid = comparison.grid
    names = {result.entry.task: result.task_metric for result in comparison.results}
    titles = {task: f"{task} ({names[task]})" if task in names else task for task in grid.tasks}
    rows = []
    for method in grid.methods:
        row = {"method": method}
        for task in grid.tasks:
            values = [result.metrics[result.task_metric] for result in comparison.of(method, task, budget)]
            row[titles[task]] = _mean_and_error(values) if values else NOTHING
        rows.append(row)
    return Table(
        title=f"The tasks' metrics in the same runs, budget r = {budget}",
        rows=rows,
        note=f"Mean ± standard error over seeds {_listed(grid.seeds)}. Rates were chosen by the loss.",
    )


def _differences_table(comparison: Comparison, budget: int) -> Table:
    grid = comparison.grid
    rows = [
        {"method": method}
        | {_task_title(comparison, task): _difference(comparison, method, task, budget) for task in grid.tasks}
        for method in grid.methods
        if method != grid.baseline
    ]
    return Table(
        title=f"Difference to {grid.baseline}, budget r = {budget}",
        rows=rows,
        note="Positive is better. Mean of the paired differences [95 % bootstrap interval, calibrated for few pairs]; "
        "seeds won-lost-equal and the p-value of the exact sign test.",
    )


def _difference(comparison: Comparison, method: str, task: str, budget: int) -> str:
    difference = comparison.difference(method, task, budget)
    if difference is None:
        return NOTHING
    interval = "[one seed]" if difference.pairs == 1 else "[diverged]"
    if difference.interval is not None:
        interval = "[{}, {}]".format(*(number(end, signed=True) for end in difference.interval))
    test = difference.sign
    return f"{number(difference.mean, signed=True)} {interval} {test.wins}-{test.losses}-{test.ties}, p = {test.p:.2g}"


def _curves_table(comparison: Comparison) -> Table:
    rows = []
    for curve in comparison.curves:
        points = (f"{point.rate:g}: {number(point.value) if point.values else 'no run'}" for point in curve.points)
        chosen = "none" if curve.chosen is None else f"{curve.chosen:g}{' (edge)' if curve.at_edge else ''}"
        entry = curve.entry
        row = {"method": entry.method, "task": entry.task, "budget": str(entry.budget), "chosen": chosen}
        rows.append({**row, "mean value at each rate": ", ".join(points)})
    return Table(
        title="Learning rates",
        rows=rows,
        note="Judged on rows split off the training rows, with seeds "
        f"{_listed(comparison.grid.tuning.seeds)}; the reported rows had no part in it.",
    )


def _value(comparison: Comparison, method: str, task: str, budget: int) -> str:
    values = list(comparison.values(method, task, budget).values())
    wanted = len(comparison.grid.seeds)
    part = f" ({len(values)} of {wanted} seeds)" if len(values) < wanted else ""
    return _mean_and_error(values) + part if values else NOTHING


def _mean_and_error(values: Sequence[float]) -> str:
    error = standard_error(values)
    return number(mean(values)) + (f" ± {number(error)}" if error is not None else "")


def _task_title(comparison: Comparison, task: str) -> str:
    metric = comparison.metric(task)
    if not metric:
        return task
    return f"{task} ({metric}{', less is better' if sign(metric) < 0 else ''})"


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))

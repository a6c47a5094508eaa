"""A comparison becomes tables, which are written as Markdown and on the screen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.filesize import decimal

from pedyra.app.console import format_seconds, print_table
from pedyra.lab.compare.results import Comparison, sign
from pedyra.lab.compare.statistics import differences, interval, standard_error
from pedyra.lora.files import write_file

NOTHING = "–"


@dataclass(frozen=True)
class TextTable:
    """Rows of column -> text; the first column names the row."""

    title: str
    rows: Sequence[Mapping[str, str]]
    note: str = ""


def write_tables(stem: Path, title: str, tables: Sequence[TextTable], remarks: Sequence[str]) -> Path:
    """Write every table with its note, and the remarks as a list, into `stem`.md."""
    parts = [f"# {title}"]
    for table in tables:
        columns = list(table.rows[0])
        lines = [columns, [":--"] + ["--:"] * (len(columns) - 1), *(row.values() for row in table.rows)]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        parts += [f"## {table.title}", body, *([table.note] if table.note else [])]
    if remarks:
        parts += ["## Remarks", "\n".join(f"- {remark}" for remark in remarks)]
    file = stem.with_suffix(".md")
    write_file(file, "\n\n".join(parts) + "\n")
    return file


def print_tables(console: Console, tables: Iterable[TextTable]) -> None:
    """Print every table with its note."""
    for table in tables:
        print_table(console, list(table.rows[0]), [list(row.values()) for row in table.rows], title=table.title)
        console.print(f"{table.note}\n", style="dim", soft_wrap=not console.is_terminal)


def number(value: float, *, signed: bool = False) -> str:
    """Write four decimals below 10, and two above."""
    return format(value, ("+" if signed else "") + (".4f" if abs(value) < 10 else ".2f"))


def comparison_tables(comparison: Comparison) -> list[TextTable]:
    """Return values and costs, then differences, for each budget; then the learning-rate curves."""
    grid, tables = comparison.grid, []
    for budget in grid.all_budgets:
        tables.append(_values_table(comparison, budget))
        if len(grid.methods) > 1:
            tables.append(_differences_table(comparison, budget))
    return [*tables, *([_curves_table(comparison)] if comparison.curves else [])]


def _values_table(comparison: Comparison, budget: int) -> TextTable:
    """Make the table of the values, of the tasks' own metrics where the values are losses, and of the costs."""
    grid, rows = comparison.grid, []
    own = {row["task"]: row["task_metric"] for row in comparison.rows} if grid.judge == "loss" else {}
    for method in grid.methods:
        row = {"method": method}
        for task in grid.tasks:
            values = list(comparison.values(method, task, budget).values())
            row[_task_title(comparison, task)] = _mean_and_error(values, len(grid.seeds))
        for task, metric in own.items():
            metrics_by_seed = comparison.values(method, task, budget, "metrics").values()
            row[f"{task} ({metric})"] = _mean_and_error([metrics[metric] for metrics in metrics_by_seed])
        rows.append(row | _resources(comparison, method, budget))
    note = f"Mean ± standard error over seeds {_listed(grid.seeds)}. Factors are relative to {grid.baseline}."
    if own:
        note += " Rates were chosen by the loss."
    return TextTable(f"{grid.name}: budget r = {budget}, equal {grid.match}", rows, note)


def _resources(comparison: Comparison, method: str, budget: int) -> dict[str, str]:
    """Return the costs of a row, with their ratio to the baseline's."""
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "parameters": ("trainable_parameters", lambda count: f"{count:,.0f}"),
        "time": ("seconds", format_seconds),
        "peak memory": ("peak_memory_bytes", lambda count: decimal(round(count))),
    }
    cells = {}
    for title, (key, text) in columns.items():
        value = comparison.mean_of(key, method, budget)
        cells[title] = NOTHING if value is None else text(value)
        if (ratio := comparison.ratio(key, method, budget)) is not None:
            cells[title] += f" ({ratio:.2f}×)"
    return cells


def _differences_table(comparison: Comparison, budget: int) -> TextTable:
    grid = comparison.grid
    rows = []
    for method in (name for name in grid.methods if name != grid.baseline):
        cells = {_task_title(comparison, task): _difference(comparison, method, task, budget) for task in grid.tasks}
        rows.append({"method": method, **cells})
    note = "Positive is better. Mean of the differences, paired by seed [Student's 95 % interval]."
    return TextTable(f"Difference to {grid.baseline}, budget r = {budget}", rows, note)


def _difference(comparison: Comparison, method: str, task: str, budget: int) -> str:
    """Return how much better a row is than the baseline."""
    better = sign(_metric(comparison, task))
    ours, theirs = (
        {seed: better * value for seed, value in comparison.values(name, task, budget).items()}
        for name in (method, comparison.grid.baseline)
    )
    values = differences(ours, theirs)
    if not values:
        return NOTHING
    between = "[one seed]" if len(values) == 1 else "[diverged]"
    if (ends := interval(values)) is not None:
        between = "[{}, {}]".format(*(number(end, signed=True) for end in ends))
    return f"{number(fmean(values), signed=True)} {between}"


def _curves_table(comparison: Comparison) -> TextTable:
    rows = []
    for curve in comparison.curves:
        values = {rate: [row["value"] for row in curve.rows if row["learning_rate"] == rate] for rate in curve.rates}
        points = (f"{rate:g}: {number(fmean(each)) if each else 'no run'}" for rate, each in values.items())
        choice = "none" if curve.best_rate is None else f"{curve.best_rate:g}{' (edge)' if curve.edge else ''}"
        entry = curve.entry
        row = {"method": entry.method, "task": entry.task, "budget": str(entry.budget), "chosen": choice}
        rows.append({**row, "mean value at each rate": ", ".join(points)})
    seeds = _listed(comparison.grid.tuning.seeds)
    note = f"Judged on rows split off the training rows, with seeds {seeds}; the reported rows had no part in it."
    return TextTable("Learning rates", rows, note)


def _mean_and_error(values: Sequence[float], count: int = 0) -> str:
    """Write mean and standard error of the values, and their number where there are fewer than `count`."""
    if not values:
        return NOTHING
    error = standard_error(values)
    part = f" ({len(values)} of {count} seeds)" if len(values) < count else ""
    return number(fmean(values)) + (f" ± {number(error)}" if error is not None else "") + part


def _metric(comparison: Comparison, task: str) -> str:
    return next((row["metric"] for row in comparison.rows if row["task"] == task), "")


def _task_title(comparison: Comparison, task: str) -> str:
    metric = _metric(comparison, task)
    if not metric:
        return task
    return f"{task} ({metric}{', less is better' if sign(metric) < 0 else ''})"


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))

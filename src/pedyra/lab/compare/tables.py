"""The tables of a comparison: values and costs, differences to the baseline, learning-rate curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pedyra.app.console import format_bytes, format_seconds
from pedyra.lab.compare.comparison import Comparison
from pedyra.lab.compare.results import sign
from pedyra.lab.compare.statistics import mean, standard_error
from pedyra.lab.compare.table_formats import TIE, Cell, Table

NOTHING = Cell("–")


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Values and costs, then differences, for each budget; then the curves."""
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
    rows = []
    for method in grid.methods:
        values = [_value(comparison, method, task, budget, standings[task]) for task in grid.tasks]
        costs = [
            _cost(comparison, "trainable_parameters", method, budget, lambda count: f"{count:,.0f}"),
            _cost(comparison, "seconds", method, budget, format_seconds),
            _cost(comparison, "peak_memory_bytes", method, budget, format_bytes),
        ]
        rows.append([Cell(method), *values, *costs])
    return Table(
        title=f"{grid.name}: budget r = {budget}, equal {grid.match}",
        columns=[
            "method",
            *(_task_title(comparison, task) for task in grid.tasks),
            "parameters",
            "time",
            "peak memory",
        ],
        rows=rows,
        note=f"Mean ± standard error over seeds {_listed(grid.seeds)}. Bold: best, with the paired 95 % interval to "
        f"every other row clear of zero; {TIE}: tied, no interval tells it from the best. Factors are relative to "
        f"{comparison.reference}. Grid {grid.fingerprint()}.",
    )


def _metrics_table(comparison: Comparison, budget: int) -> Table:
    """The tasks' own metrics, where the loss is judged: without standings, for nothing was chosen by them."""
    grid = comparison.grid
    rows = []
    for method in grid.methods:
        cells = []
        for task in grid.tasks:
            values = [result.metrics[result.task_metric] for result in comparison.of(method, task, budget)]
            cells.append(Cell(_mean_and_error(values)) if values else NOTHING)
        rows.append([Cell(method), *cells])
    names = {result.entry.task: result.task_metric for result in comparison.results}
    return Table(
        title=f"The tasks' metrics in the same runs, budget r = {budget}",
        columns=["method", *(f"{task} ({names[task]})" if task in names else task for task in grid.tasks)],
        rows=rows,
        note=f"Mean ± standard error over seeds {_listed(grid.seeds)}. Rates were chosen by the loss.",
    )


def _mean_and_error(values: Sequence[float]) -> str:
    error = standard_error(values)
    return number(mean(values)) + (f" ± {number(error)}" if error is not None else "")


def _value(comparison: Comparison, method: str, task: str, budget: int, standing: dict[str, str]) -> Cell:
    values = list(comparison.values(method, task, budget).values())
    if not values:
        return NOTHING
    text = _mean_and_error(values)
    if len(values) < len(comparison.grid.seeds):
        text += f" ({len(values)} of {len(comparison.grid.seeds)} seeds)"
    return Cell(text, bold=standing.get(method) == "best", tie=standing.get(method) == "tied")


def _cost(comparison: Comparison, key: str, method: str, budget: int, show: Callable[[float], str]) -> Cell:
    cost, ratio = comparison.cost(key, method, budget), comparison.ratio(key, method, budget)
    if cost is None:
        return NOTHING
    return Cell(show(cost) + (f" ({ratio:.2f}×)" if ratio is not None else ""))


def _differences_table(comparison: Comparison, budget: int) -> Table:
    grid = comparison.grid
    rows = []
    for method in grid.methods:
        if method != grid.baseline:
            rows.append([Cell(method), *(_difference(comparison, method, task, budget) for task in grid.tasks)])
    return Table(
        title=f"Difference to {grid.baseline}, budget r = {budget}",
        columns=["method", *(_task_title(comparison, task) for task in grid.tasks)],
        rows=rows,
        note="Positive is better. Mean of the paired differences [95 % bootstrap interval, calibrated for few pairs]; "
        "seeds won-lost-equal and the p-value of the exact sign test.",
    )


def _difference(comparison: Comparison, method: str, task: str, budget: int) -> Cell:
    difference = comparison.difference(method, task, budget)
    if difference is None:
        return NOTHING
    interval = "[one seed]" if difference.pairs == 1 else "[diverged]"
    if difference.interval is not None:
        interval = "[{}, {}]".format(*(number(end, signed=True) for end in difference.interval))
    test = difference.sign
    text = f"{number(difference.mean, signed=True)} {interval} {test.wins}-{test.losses}-{test.ties}, p = {test.p:.2g}"
    return Cell(text)


def _curves_table(comparison: Comparison) -> Table:
    tuning = comparison.grid.tuning
    rows = []
    for curve in comparison.curves:
        points = ", ".join(
            f"{point.rate:g}: {number(point.value) if point.values else 'no run'}" for point in curve.points
        )
        chosen = "none" if curve.chosen is None else f"{curve.chosen:g}"
        cell = curve.entry
        edge = " (edge)" if curve.at_edge else ""
        rows.append([Cell(cell.method), Cell(cell.task), Cell(str(cell.budget)), Cell(chosen + edge), Cell(points)])
    return Table(
        title="Learning rates",
        columns=["method", "task", "budget", "chosen", "mean value at each rate"],
        rows=rows,
        note=f"Judged on rows split off the training rows ({tuning.fraction:.0%}), with seeds {_listed(tuning.seeds)}; "
        "the reported rows had no part in it.",
    )


def number(value: float, *, signed: bool = False) -> str:
    """Four decimals below 10, two above."""
    return format(value, ("+" if signed else "") + (".4f" if abs(value) < 10 else ".2f"))


def _task_title(comparison: Comparison, task: str) -> str:
    metric = comparison.metric(task)
    if not metric:
        return task
    return f"{task} ({metric}{', less is better' if sign(metric) < 0 else ''})"


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))

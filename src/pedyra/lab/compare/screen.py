"""What a comparison shows: finished runs and means so far while it runs, its tables and remarks at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pedyra.app.console import print_whole
from pedyra.lab.compare.experiment import Experiment
from pedyra.lab.compare.jobs import Entry, Job, Outcome, final_row
from pedyra.lab.compare.statistics import mean
from pedyra.lab.compare.table_formats import TIE
from pedyra.lab.compare.table_formats import Table as Content


class LiveTable:
    """While entered, a table of these jobs that `report` brings up to date; without a terminal, a line a job."""

    def __init__(self, console: Console, title: str, jobs: Sequence[Job]) -> None:
        self.console, self.title, self.jobs = console, title, jobs
        self.failed: list[Outcome] = []
        self._values = {job.run: _value(final) for job in jobs if (final := final_row(job.run)) is not None}
        self._ended = len(self._values)
        self._live = Live(self._table(), console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> LiveTable:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def report(self, outcome: Outcome) -> None:
        """Take in how a job ended."""
        self._ended += 1
        final = final_row(outcome.job.run)
        if final is not None:
            self._values[outcome.job.run] = _value(final)
        if outcome.status == "failed":
            self.failed.append(outcome)
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        else:
            told = outcome.message or outcome.status
            if final is not None:
                told = "diverged" if _diverged(final) else f"{final['metric']} {final['value']:.4f}"
            progress = f"[{self._ended}/{len(self.jobs)}]"
            self.console.print(f"{progress} {outcome.job.label}: {told}", soft_wrap=True, markup=False)

    def _table(self) -> Table:
        entries: dict[Entry, list[Job]] = {}
        for job in self.jobs:
            entries.setdefault(job.entry, []).append(job)
        columns = list(dict.fromkeys((entry.task, entry.budget) for entry in entries))
        table = Table(title=f"{self.title}: {self._ended} of {len(self.jobs)} runs", title_justify="left", box=None)
        table.add_column("method")
        for task, budget in columns:
            table.add_column(f"{task} r={budget}", justify="right")
        broken = {outcome.job.entry for outcome in self.failed}
        for method in dict.fromkeys(entry.method for entry in entries):
            mine = {(entry.task, entry.budget): entry for entry in entries if entry.method == method}
            table.add_row(method, *(self._cell(entries, mine.get(column), broken) for column in columns))
        return table

    def _cell(self, entries: dict[Entry, list[Job]], entry: Entry | None, broken: set[Entry]) -> str:
        jobs = entries[entry] if entry is not None else []
        values = [self._values[job.run] for job in jobs if job.run in self._values]
        shown = f"{mean(values):.4f} " if values else ""
        return f"{shown}{len(values)}/{len(jobs)}{' failed' if entry in broken else ''}"


def print_jobs(console: Console, experiment: Experiment, entries: int, tuning: int) -> None:
    """How many runs there are, and what matching changed."""
    grid = experiment.grid
    where = "" if entries == len(experiment.entries) else f" (of {len(experiment.entries)}; this is one shard)"
    console.print(f"{grid.name}, grid {grid.fingerprint()}: {entries} rows x tasks x budgets{where}", soft_wrap=True)
    console.print(f"runs        {tuning} to choose rates, {entries * len(grid.seeds)} reported", soft_wrap=True)
    told = set()
    for entry, matched in experiment.matched.items():
        steps = {} if matched.max_steps is None else {"max_steps": matched.max_steps}
        changes = {**({"r": matched.r} if matched.r != entry.budget else {}), **steps}
        changes |= {f"method_settings.{key}": value for key, value in matched.method_settings.items()}
        if changes:
            listed = ", ".join(f"{key} = {value}" for key, value in changes.items())
            told.add(f"matched     {entry.method}, r = {entry.budget}: {listed}")
    for line in sorted(told):
        console.print(line, soft_wrap=True, markup=False)


def print_comparison(console: Console, tables: Sequence[Content], remarks: Sequence[str]) -> None:
    """Every table with its note, then the remarks."""
    for content in tables:
        table = Table(title=content.title, title_justify="left", box=None, pad_edge=False)
        for index, column in enumerate(content.columns):
            table.add_column(column, justify="right" if index else "left", overflow="fold")
        for row in content.rows:
            marked = [(f"{cell.text} {TIE}" if cell.tie else cell.text, "bold" if cell.bold else "") for cell in row]
            table.add_row(*(Text(text, style=style) for text, style in marked))
        print_whole(console, table)
        console.print(content.note, style="dim", markup=False, soft_wrap=not console.is_terminal)
        console.print()
    for remark in remarks:
        console.print(f"- {remark}", markup=False, soft_wrap=True)


def _value(final: Mapping[str, Any]) -> float:
    """What the table shows of a run."""
    return math.nan if _diverged(final) else final["value"]


def _diverged(final: Mapping[str, Any]) -> bool:
    """Whether the run's loss on the held-out rows is no number."""
    return final["eval_loss"] is None or final["value"] is None

"""While a comparison runs, its table counts what has ended and shows the means so far."""

from __future__ import annotations

import io
import json

from rich.console import Console

from pedyra.lab.compare.compare import compare_grid
from pedyra.lab.compare.experiment import prepare_experiment
from pedyra.lab.compare.jobs import Outcome
from pedyra.lab.compare.screen import LiveTable


def test_the_live_table_counts_and_averages(make_grid, folder):
    grid = make_grid("learning_rates=[0.1]")
    compare_grid(grid)
    experiment = prepare_experiment(grid, folder / "runs/grid", lambda jobs: None)
    jobs = [job for entry in experiment.entries for job in experiment.reported_jobs(entry, {})]
    (jobs[-1].run / "metrics.jsonl").unlink()
    out = io.StringIO()
    with LiveTable(Console(file=out, force_terminal=True, width=100), "runs", jobs) as live:
        live.report(Outcome(jobs[-1], "failed", "no luck"))
    shown = out.getvalue()
    assert "runs: 5 of 6 runs" in shown and "runs: 6 of 6 runs" in shown
    assert "0.5200 3/3" in shown  # 0.5 + 0.1 / 10 + (0 + 1 + 2) / 300
    assert "0.6150 2/3 failed" in shown


def test_a_run_that_diverged_earlier_is_shown_as_no_number(make_grid, folder):
    grid = make_grid("learning_rates=[0.1]")
    compare_grid(grid)
    experiment = prepare_experiment(grid, folder / "runs/grid", lambda jobs: None)
    jobs = [job for entry in experiment.entries for job in experiment.reported_jobs(entry, {})]
    metrics = jobs[-1].run / "metrics.jsonl"
    *lines, last = metrics.read_text().splitlines()
    final = {**json.loads(last), "value": None, "eval_loss": None}
    metrics.write_text("\n".join([*lines, json.dumps(final)]) + "\n")
    out = io.StringIO()
    with LiveTable(Console(file=out, force_terminal=True, width=100), "runs", jobs):
        pass
    assert "nan 3/3" in out.getvalue() and "0.5200 3/3" in out.getvalue()


def test_without_a_terminal_there_is_a_line_a_run(make_grid):
    out = io.StringIO()
    compare_grid(make_grid("learning_rates=[0.1]"), console=Console(file=out, width=200))
    text = out.getvalue()
    assert "2 rows x tasks x budgets" in text and "0 to choose rates, 6 reported" in text
    assert "lora on toy, r = 2, rate 0.1, seed 0: accuracy 0.5100" in text
    assert "[6/6]" in text and "written     runs/grid/comparison.md" in text

"""Text of the tables against the records."""

from __future__ import annotations

from pathlib import Path

from pedyra.app.report import facts
from pedyra.app.report.records import read_run


def test_the_layer_table_balances(dynamic_run: Path):
    table = facts.layers(read_run(dynamic_run))
    assert table.head[1:5] == ["Rank at start", "at end", "Pruned", "Added"] and len(table.rows) == 36
    for row in table.rows:
        start, end, pruned, added = map(int, row[1:5])
        assert start + added - pruned == end


def test_what_a_run_does_not_know_is_left_out(lora_run: Path):
    known = facts.facts(read_run(lora_run))
    assert list(known) == ["Accuracy", "Trainable parameters", "Training time", "Peak memory"]


def test_a_fit_tells_the_size_that_is_left(fitted_run: Path):
    size = facts.facts(read_run(fitted_run))["Smaller adapter"]
    assert size.value == "500" and "50%" in size.detail


def test_runs_side_by_side_have_a_column_each(dynamic_run: Path, lora_run: Path):
    table = facts.comparison([read_run(dynamic_run), read_run(lora_run)])
    rows = {name: values for name, *values in table.rows}
    assert rows["Method"] == ["pedyra", "lora"] and rows["Adjustments"][1] == "–"

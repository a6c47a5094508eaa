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


def test_an_adjustment_row_counts_repeated_layers(dynamic_run: Path):
    run = read_run(dynamic_run)
    name = run.layers[0].name
    run.adjustments[0]["pruned"] = [[name, 0, 0.1], [name, 1, 0.2]]
    run.adjustments[0]["added"] = {}
    assert list(facts.adjustments(run).rows[0][:3]) == ["50", "query 0 ×2", "–"]


def test_what_a_run_does_not_know_has_no_value(lora_run: Path):
    values = {fact.name: fact.value for fact in facts.facts(read_run(lora_run))}
    assert {name for name, value in values.items() if value == facts.ABSENT} == {
        "Adjustments",
        "Total rank",
        "Smaller adapter",
    }


def test_a_fit_tells_the_size_that_is_left(fitted_run: Path):
    size = next(fact for fact in facts.facts(read_run(fitted_run)) if fact.name == "Smaller adapter")
    assert size.value == "500" and "50%" in size.detail

"""Measured beside published: means, errors, intervals, averages of a row, and what a reader is told."""

from __future__ import annotations

import math

import pytest

from pedyra.lab.paper.item import get_item
from pedyra.lab.paper.item_results import difference_table, remarks, result_table, results


def test_a_mean_its_error_and_its_interval_by_hand():
    values = {("with input-based", "MBPP"): {0: 38.0, 1: 40.0, 2: 42.0}}
    result = results(get_item("table6"), "full", values, {("with input-based", "MBPP"): 2e-4})
    one = next(row for row in result if row["values"])
    error = 2 / math.sqrt(3)  # standard deviation 2, three seeds
    assert one == {
        **{"id": "table6", "row": "with input-based", "column": "MBPP", "published": 38.9, "measured": 40.0},
        **{"standard_error": pytest.approx(error), "seeds": 3, "scale": "full"},
        **{"interval_low": pytest.approx(40 - 4.302653 * error), "interval_high": pytest.approx(40 + 4.302653 * error)},
        "learning_rate": 2e-4,
        "values": {"0": 38.0, "1": 40.0, "2": 42.0},
    }
    table = result_table(get_item("table6"), "full", result)
    assert [row["MBPP"] for row in table.rows] == ["– (38.4)", "40.00 ± 1.15 [35.03, 44.97] (38.9)"]


def test_an_average_is_over_the_measured_columns_and_their_common_seeds():
    values = {("PE-DyRA", "SST-2"): {0: 90.0, 1: 92.0}, ("PE-DyRA", "CoLA"): {1: 60.0, 2: 70.0}}
    result = results(get_item("table2"), "small", values, {})
    average = next(row for row in result if (row["row"], row["column"]) == ("PE-DyRA", "All"))
    assert average["values"] == {"1": 76.0} and average["interval_low"] is None
    lines = remarks(get_item("table2"), "small", result)
    assert "Measured averages are over the measured columns." in lines
    assert any(remark.startswith("Not measured: MNLI, QNLI") for remark in lines)


def test_an_average_of_a_part_is_told_to_be_of_other_columns_than_the_published_one():
    part = get_item("table2").only(columns=["SST-2", "All"])
    result = results(part, "small", {("PE-DyRA", "SST-2"): {0: 90.0}}, {})
    assert "Measured averages are over the measured columns." in remarks(part, "small", result)
    whole = get_item("table2")
    every = {("PE-DyRA", column): {0: 90.0} for column, of in whole.columns.items() if not of.average}
    assert "Measured averages are over the measured columns." not in remarks(
        whole, "full", results(whole, "full", every, {})
    )


def test_rows_are_averaged_over_the_same_columns():
    values = {("LoRA", "SST-2"): {0: 90.0}, ("LoRA", "CoLA"): {0: 60.0}, ("PE-DyRA", "SST-2"): {0: 91.0}}
    result = results(get_item("table2"), "small", values, {})
    averages = {row["row"]: row["values"] for row in result if row["column"] == "All" and row["values"]}
    assert averages == {"LoRA": {"0": 90.0}, "PE-DyRA": {"0": 91.0}}


def test_differences_are_paired_by_seed_and_to_the_first_row_of_a_group():
    item = get_item("table12")
    rows = ("LLaMA2-7B, DoRA", "LLaMA2-7B, PE-DyRA+DoRA", "LLaMA3-8B, QLoRA", "LLaMA3-8B, PE-DyRA+QLoRA")
    values = {(row, "MBPP"): {0: 30.0 + i, 1: 40.0 + i} for i, row in enumerate(rows)}
    table = difference_table(item, "full", results(item, "full", values, {}))
    assert table is not None
    texts = {row[""]: row["MBPP"] for row in table.rows}
    assert texts == {
        "LLaMA2-7B, PE-DyRA+DoRA": "+1.00 [1.00, 1.00] (+1.3)",
        "LLaMA2-7B, PE-DyRA+QLoRA": "– (+1.9)",
        "LLaMA3-8B, PE-DyRA+DoRA": "– (+1)",
        "LLaMA3-8B, PE-DyRA+QLoRA": "+1.00 [1.00, 1.00] (+3.7)",
    }


def test_a_scale_may_have_columns_of_its_own_with_nothing_published():
    item = get_item("table12").at("smoke")
    assert list(item.columns) == ["perplexity"] and item.value("LLaMA2-7B, DoRA", "perplexity") is None
    assert {(cell.column, cell.metric, cell.part.factor) for cell in item.cells("smoke")} == {
        ("perplexity", "perplexity", 1.0)
    }
    whole = get_item("table3")
    table = result_table(whole.at("smoke"), "smoke", results(whole.at("smoke"), "smoke", {}, {}))
    assert list(table.rows[0]) == ["", "perplexity"] and whole.at("full") == whole


def test_an_item_of_one_row_has_no_differences():
    assert difference_table(get_item("figure11"), "smoke", results(get_item("figure11"), "smoke", {}, {})) is None


def test_where_rows_are_tasks_settings_are_compared_with_the_best_of_the_paper():
    item = get_item("table14")
    values = {("SST-2 (Acc.)", "k=4"): {0: 79.0, 1: 80.0}, ("SST-2 (Acc.)", "k=12"): {0: 78.0, 1: 81.0}}
    table = difference_table(item, "full", results(item, "full", values, {}))
    assert table is not None and table.title == "Difference to k=12"
    first = table.rows[0]
    assert list(first) == ["", "k=4", "k=8", "k=24"] and first[""] == "SST-2 (Acc.)"
    assert first["k=8"] == "– (-0.46)" and first["k=4"].startswith("0.00 [")
    one_column = item.only(columns=["k=4"])
    assert difference_table(one_column, "full", results(one_column, "full", {}, {})) is None

"""The published numbers: complete, consistent with the averages that the paper prints, and tied to recipes."""

from __future__ import annotations

import pytest

from pedyra.lab.paper.item import RECIPES, SCALES, get_item, items
from pedyra.methods.registry import METHODS

IDS = (
    *("table2", "table3", "table4", "table5", "table6", "table10", "table11", "table12", "table13", "table14"),
    *("figure1a", "figure1b", "figure3", "figure4a", "figure4b", "figure5", "figure6", "figure7", "figure8"),
    *("figure9", "figure10", "figure11"),
)
AVERAGES = [
    (item.id, row, column)
    for item in items().values()
    for row in item.published
    for column, part in item.columns.items()
    if part.average
]


def test_every_table_and_figure_that_is_run_has_one_file():
    assert tuple(items()) == IDS


@pytest.mark.parametrize("name", IDS)
def test_a_published_table_is_whole_and_every_scale_measures_something(name):
    item = items()[name]
    if not item.is_figure:
        assert set(item.published) == set(item.rows)
        assert all(value is not None for row in item.published.values() for value in row)
    for scale in SCALES:
        cells = list(item.cells(scale))
        assert cells
        assert {cell.row for cell in cells} <= set(item.at(scale).rows)
        assert all((RECIPES / f"{cell.recipe}.yaml").is_file() and cell.part.method in METHODS for cell in cells)


@pytest.mark.parametrize("name", IDS)
def test_the_full_scale_measures_every_column(name):
    item = items()[name]
    measured = {cell.column for cell in item.cells("full")}
    assert measured == {column for column, part in item.columns.items() if not part.average}


@pytest.mark.parametrize(("name", "row", "column"), AVERAGES)
def test_printed_averages_follow_from_the_printed_values(name, row, column):
    # The paper rounds to two or three decimals, some halves down (88.5475 is printed as 88.547).
    item = items()[name]
    columns = item.columns[column].over or [key for key, part in item.columns.items() if not part.average]
    values = [item.value(row, key) for key in columns]
    printed = item.value(row, column)
    half = 0.51 * 10.0 ** -len(str(printed).partition(".")[2])
    assert printed == pytest.approx(sum(value for value in values if value is not None) / len(values), abs=half)


def test_a_cell_is_its_row_and_its_column_together():
    cells = {(cell.row, cell.column): cell for cell in get_item("table3").cells("full")}
    cell = cells["LLaMA3-8B, DoRA", "MBPP"]
    assert (cell.recipe, cell.part.method, cell.metric, get_item("table3").value(cell.row, cell.column)) == (
        "llama3_python",
        "dora",
        "mbpp",
        72.0,
    )
    by_k = {cell.column: cell.part.settings for cell in get_item("table14").cells("full") if cell.row == "RTE (Acc.)"}
    assert by_k == {f"k={k}": {"moves": k} for k in (4, 8, 12, 24)}


def test_a_part_of_a_table_keeps_its_published_numbers():
    part = get_item("table3").only(["LLaMA2-7B, LoRA", "LLaMA2-7B, PE-DyRA"], ["HumanEval"])
    assert [(cell.row, part.value(cell.row, cell.column)) for cell in part.cells("full")] == [
        ("LLaMA2-7B, LoRA", 26.0),
        ("LLaMA2-7B, PE-DyRA", 33.5),
    ]
    assert get_item("table3").only().published == get_item("table3").published


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (["+Prun"], [], "table5 has no row '\\+Prun'; did you mean '\\+Prune'"),
        ([], ["STSB"], "table5 has no column 'STSB'; did you mean 'STS-B'"),
    ],
)
def test_a_part_that_is_not_there_names_the_nearest(rows, columns, message):
    with pytest.raises(ValueError, match=message):
        get_item("table5").only(rows, columns)

"""`pedyra paper run` at scale smoke: every id comes to its numbers, its files, and, for a figure, its picture."""

from __future__ import annotations

import pytest

from pedyra.paper.item import get_item, items


@pytest.mark.parametrize("name", items())
def test_every_id_runs_at_scale_smoke(name, smoke):
    item, outcome = get_item(name), smoke(name)
    assert not outcome.failed and not outcome.missing
    measured = {(result.row, result.column) for result in outcome.results if result.measured is not None}
    assert {(cell.row, cell.column) for cell in item.cells("smoke")} <= measured
    assert len(outcome.results) == len(item.rows) * len(item.columns)
    suffixes = ["md", "tex", "html", "csv", "jsonl", *(["svg", "png"] if item.is_figure else [])]
    assert [file.name for file in outcome.files] == [f"{name}.{suffix}" for suffix in suffixes]
    assert all(file.stat().st_size for file in outcome.files)

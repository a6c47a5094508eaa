"""The comparisons behind the tables: what shares a run, and which rates each method chooses from."""

from __future__ import annotations

import pytest

from pedyra.lab.paper.item import get_item
from pedyra.lab.paper.places import Places
from pedyra.lab.paper.run_item import measurements


def planned(name, scale, tmp_path, rows=()):
    """The only grid of these rows."""
    (result,) = measurements(get_item(name).only(rows), scale, tmp_path, Places())
    return result


def test_a_setting_that_the_recipe_has_too_makes_no_run_of_its_own(tmp_path):
    own = {}
    for scale in ("full", "small"):
        cells = planned("table14", scale, tmp_path, ["SST-2 (Acc.)"]).cells
        own[scale] = {cell.column: cell.part.settings for cell in cells}
    assert own["full"] == {"k=4": {"moves": 4}, "k=8": {"moves": 8}, "k=12": {}, "k=24": {"moves": 24}}
    assert own["small"]["k=12"] == {"moves": 12}  # its recipe moves 6


def test_encoders_choose_a_rate_at_scale_small_and_starts_without_gradients_from_higher_ones(tmp_path):
    grid = planned("figure4b", "small", tmp_path).grid
    assert grid.rates("pedyra") == [1e-3, 3e-3, 1e-2, 3e-2]
    assert grid.tuning.rows == 1000
    grids = [result.grid for result in measurements(get_item("table11"), "small", tmp_path, Places())]
    for grid in grids:  # on PiSSA, E starts at the singular values
        for row in ("pissa", "pedyra_init=pissa"):
            assert grid.rates(row) == pytest.approx([1e-4, 3e-4, 1e-3, 3e-3])
    assert planned("table6", "small", tmp_path).grid.rates("pedyra") == [2e-3]
    assert planned("figure4b", "full", tmp_path).grid.rates("pedyra") == [8e-4]

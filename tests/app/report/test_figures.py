"""What the figures hold, checked against the records they are made from."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pedyra.app.report.chart import Axes, Curve, curves, spec_of
from pedyra.app.report.figures import importance_ranks, make_figures, notable, utilisation
from pedyra.app.report.records import read_run

ALL = "map history loss effective-rank".split()
Figures = dict[str, Any]


def figures_of(folder: Path) -> Figures:
    return {figure.id: figure for figure in make_figures(read_run(folder))}


def columns(chart: Any) -> dict[str, dict[str, list[Any]]]:
    """Name of a curve -> the columns of its points."""
    found: dict[str, dict[str, list[Any]]] = {}
    for row in chart.data.values:
        for key, value in row.items():
            found.setdefault(row["name"], {}).setdefault(key, []).append(value)
    return found


def drawn(chart: Any) -> dict[str, dict[str, list[Any]]]:
    """The curves in the foreground."""
    return {name: each for name, each in columns(chart).items() if each["kind"][0] == "drawn"}


@pytest.fixture(scope="module")
def figures(dynamic_run: Path) -> Figures:
    return figures_of(dynamic_run)


def test_a_run_of_the_paper_has_every_figure(figures: Figures):
    assert list(figures) == ALL


def test_a_plain_lora_run_shows_its_losses_alone(lora_run: Path):
    (figure,) = make_figures(read_run(lora_run))
    assert [panel.title for panel in figure.panels] == ["Training loss", "Held-out loss", "Held-out accuracy"]


def test_a_long_run_is_drawn_by_few_points_from_its_first_to_its_last(lora_run: Path, tmp_path: Path):
    folder = shutil.copytree(lora_run, tmp_path / "long")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    logged = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 20_001)]
    (folder / "metrics.jsonl").write_text("\n".join([*logged, lines[-1]]) + "\n")
    (curve,) = columns(figures_of(folder)["loss"].panels[0].chart).values()
    assert len(curve["x"]) < 1000 and (curve["x"][0], curve["x"][-1]) == (1, 20_000)
    assert curve["y"] == pytest.approx([1 / step for step in curve["x"]])


def test_of_a_run_that_was_fitted_the_curve_comes_first(fitted_run: Path):
    figures = figures_of(fitted_run)
    assert next(iter(figures)) == "fit"
    (panel,) = figures["fit"].panels
    curves = drawn(panel.chart)
    (curve,) = curves.values()
    assert (curve["x"], curve["y"]) == ([2, 4, 8], [0.25, 0.02, 0])  # the whole adapter is at 0
    assert (curve["low"], curve["high"]) == ([0.21, 0.003, None], [0.29, 0.037, None])
    spec = spec_of(panel.chart)
    rings = [row for layer in spec["layer"] for row in layer.get("data", {}).get("values", ())]
    assert {"x": 4, "y": 0.02} in rings
    assert spec["layer"][0]["encoding"]["x"]["axis"]["values"] == [2, 4, 8]


def test_a_curve_of_one_point_is_not_drawn(fitted_run: Path, dynamic_run: Path):
    run = read_run(fitted_run)
    once = [{**row, "eval_loss": None} for row in run.metrics[:1]]
    figures = make_figures(replace(run, curve=run.curve[:1], metrics=once))
    assert [figure.id for figure in figures] == []
    run = read_run(dynamic_run)
    (history,) = [each for each in make_figures(replace(run, adjustments=run.adjustments[:1])) if each.id == "history"]
    assert [panel.title for panel in history.panels] == ["Rank"]


@pytest.mark.parametrize(("values", "within"), [([0.773], (0.69, 0.86)), ([0.0], (-1, 1)), ([-2.0], (-2.3, -1.7))])
def test_a_single_value_has_room_around_it(values: list[float], within: tuple[float, float]):
    """Vega draws a scale of one value at its middle and writes another number there."""
    spec = spec_of(curves([Curve("run", [160], values)], Axes("step", "accuracy")))
    low, high = spec["layer"][0]["encoding"]["y"]["scale"]["domain"]
    assert within[0] <= low < values[0] < high <= within[1]


def test_a_single_value_of_a_logarithmic_axis_has_room_too():
    spec = spec_of(curves([Curve("run", [4], [8.0])], Axes("size", "loss", log_x=True, log_y=True)))
    encoding = spec["layer"][0]["encoding"]
    assert (encoding["x"]["scale"]["domain"], encoding["y"]["scale"]["domain"]) == ([2, 8], [4, 16])


def test_every_axis_is_labelled_and_every_figure_explained(figures: Figures):
    for figure in figures.values():
        assert len(figure.caption) > 60
        for panel in figure.panels if figure.id != "map" else []:
            last = spec_of(panel.chart)["layer"][-1]["encoding"]
            assert last["y"]["title"] and last.get("x", {}).get("title", "of another layer")


def test_the_map_has_the_start_and_one_frame_per_adjustment(figures: Figures, dynamic_run: Path):
    (panel,) = figures["map"].panels
    run = read_run(dynamic_run)
    cells = spec_of(panel.chart)["data"]["values"]
    assert len(cells) == 36 and {cell["ranks"][0] for cell in cells} == {8}
    assert {len(cell["ranks"]) for cell in cells} == {len(panel.frames)} == {21}
    assert panel.frames[-1].startswith("Adjustment 20 of 20, step 240: ")
    cell = next(cell for cell in cells if (cell["type"], cell["depth"]) == ("intermediate", "5"))
    end = run.adjustments[-1]["ranks"]["bert.encoder.layer.5.intermediate.dense"]
    assert (cell["ranks"][-1], sum(cell["changes"])) == (end, end - 8)


def test_layers_at_one_place_share_a_cell_and_what_is_outside_of_blocks_comes_last(lora_run: Path, tmp_path: Path):
    folder = Path(shutil.copytree(lora_run, tmp_path / "experts"))
    rows = [("pooler", "pooler", 0, 4), ("h.1.experts.0.up", "up", 1, 8), ("h.1.experts.1.up", "up", 1, 3)]
    layers = [dict(zip(("name", "type", "depth", "rank"), row, strict=True)) for row in rows]
    (folder / "ranks.jsonl").write_text(json.dumps({"kind": "layers", "layers": layers}) + "\n")
    (panel,) = figures_of(folder)["map"].panels
    cells = [(cell["type"], cell["depth"], cell["ranks"]) for cell in spec_of(panel.chart)["data"]["values"]]
    assert cells == [("up", "1", [5.5]), ("pooler", "–", [4])]


def test_the_history_colours_the_layers_that_changed_most_and_holds_all(figures: Figures, dynamic_run: Path):
    run = read_run(dynamic_run)
    change = {layer.name: run.final_ranks[layer.name] - 8 for layer in run.layers}
    ordered = sorted(change.values(), reverse=True)
    assert [change[layer.name] for layer in notable(run)] == ordered[:3] + ordered[-3:]
    ranks, places = figures["history"].panels
    for panel in (ranks, places):
        assert len(drawn(panel.chart)) == 6
        assert set(columns(panel.chart)) == {layer.short_name for layer in run.layers}
    scores = run.adjustments[0]["layer_scores"]
    best = max(run.layers, key=lambda layer: scores[layer.name])
    assert columns(places.chart)[best.short_name]["y"][0] == 1


def test_a_run_in_which_nothing_moved_says_so(still_run: Path):
    figures = figures_of(still_run)
    assert "No layer changed its rank." in figures["history"].caption


def test_importance_ranks_begin_at_one_and_break_ties_by_layer_order():
    assert importance_ranks({"a": 0.2, "b": 0.9, "c": 0.2, "d": 0.5}) == {"a": 3, "b": 1, "c": 4, "d": 2}


def test_utilisation_is_effective_rank_over_rank():
    assert utilisation({"effective_rank": {"a": 3.0, "b": 1.5}, "ranks": {"a": 4, "b": 2}}) == pytest.approx(0.75)
    assert utilisation({"effective_rank": {"a": 0.0}, "ranks": {"a": 0}}) is None
    assert utilisation({"effective_rank": {"a": math.nan}, "ranks": {"a": 2}}) is None
    assert utilisation({"ranks": {"a": 4}}) is None

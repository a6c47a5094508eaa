"""What the figures hold, checked against the records they are made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pedyra.app.report.chart import Axes, Curve, Spec, curves
from pedyra.app.report.figure import fixed
from pedyra.app.report.figures import make_figures
from pedyra.app.report.rank_figures import notable
from pedyra.app.report.run_folder import read_run, read_runs

ALL = "map history moves loss effective-rank variance spearman orthogonality gradients parameters".split()
Figures = dict[str, Any]


def figures_of(*folders: Path) -> Figures:
    return {figure.id: figure for figure in make_figures(read_runs(folders))}


def drawn(spec: Spec) -> dict[str, Any]:
    """Name -> row of the curves in the foreground."""
    return {row["name"]: row for row in spec["data"]["values"] if row["kind"] == "drawn"}


@pytest.fixture(scope="module")
def figures(dynamic_run: Path) -> Figures:
    return figures_of(dynamic_run)


def with_method(run: Path, folder: Path, method: str, **config: float) -> Path:
    """A copy of the run, by another method."""
    shutil.copytree(run, folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "method": method}))
    header, *rest = (folder / "ranks.jsonl").read_text().splitlines(keepends=True)
    told = {**json.loads(header), "config": config}
    (folder / "ranks.jsonl").write_text("".join([json.dumps(told) + "\n", *rest]))
    return folder


def test_a_run_of_the_paper_has_every_figure(figures: Figures):
    assert list(figures) == ALL


def test_what_means_nothing_for_a_method_is_not_drawn(dynamic_run: Path, tmp_path: Path):
    """Ranks that follow no importance have no correlation with it, and directions that nothing holds apart no curve."""
    at_random = figures_of(with_method(dynamic_run, tmp_path / "random", "random", orth_weight=0.0))
    assert set(ALL) - at_random.keys() == {"variance", "spearman", "orthogonality"}


def test_a_plain_lora_run_shows_its_losses_alone(lora_run: Path):
    (figure,) = make_figures(read_runs([lora_run]))
    assert [panel.title for panel in figure.panels] == ["Training loss", "Held-out loss", "Held-out accuracy"]


def test_of_a_run_that_was_fitted_the_curve_comes_first(fitted_run: Path):
    figures = figures_of(fitted_run)
    assert next(iter(figures)) == "fit"
    (panel,) = figures["fit"].panels
    curves = drawn(panel.spec)
    assert (curves["measured"]["x"], curves["measured"]["y"]) == ([100, 500], [0.25, 0.02])
    assert curves["measured"]["low"] == pytest.approx([0.2108, 0.0004])  # 1.96 standard errors
    assert (curves["predicted"]["x"], curves["predicted"]["y"]) == ([50, 100, 500], [0.9, 0.3, 0.01])
    assert curves["predicted"]["low"] == curves["predicted"]["y"]  # it has no band
    recovered = curves["after recovery"]
    assert (recovered["x"], recovered["y"]) == ([50, 100], [0.4, 0.1])
    caption = figures["fit"].caption
    for told in ("500 parameters (50% of the adapter)", "+0.02", "accuracy", "base model 0.5000", "0.8100"):
        assert told in caption


@pytest.mark.parametrize(("values", "within"), [([0.773], (0.69, 0.86)), ([0.0], (-1, 1)), ([-2.0], (-2.3, -1.7))])
def test_a_single_value_has_room_around_it(values: list[float], within: tuple[float, float]):
    """Vega draws a scale of one value at its middle and writes another number there."""
    spec = curves([Curve("run", [160], values)], Axes("step", "accuracy"))
    low, high = spec["layer"][0]["encoding"]["y"]["scale"]["domain"]
    assert within[0] <= low < values[0] < high <= within[1]


def test_a_single_value_of_a_logarithmic_axis_has_room_too():
    spec = curves([Curve("run", [4], [8.0])], Axes("size", "loss", log_x=True, log_y=True))
    encoding = spec["layer"][0]["encoding"]
    assert (encoding["x"]["scale"]["domain"], encoding["y"]["scale"]["domain"]) == ([2, 8], [4, 16])


def test_every_axis_is_labelled_and_every_figure_explained(figures: Figures):
    for figure in figures.values():
        assert len(figure.caption) > 60
        for panel in figure.panels if figure.id != "map" else []:
            last = panel.spec["layer"][-1]["encoding"]
            assert last["y"]["title"] and last.get("x", {"title": "of another layer"})["title"]


def test_the_map_has_the_start_and_one_frame_per_adjustment(figures: Figures, dynamic_run: Path):
    (panel,) = figures["map"].panels
    run = read_run(dynamic_run)
    cells = panel.spec["data"]["values"]
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
    cells = [(cell["type"], cell["depth"], cell["ranks"]) for cell in panel.spec["data"]["values"]]
    assert cells == [("up", "1", [5.5]), ("pooler", "–", [4])]


def test_the_history_colours_the_layers_that_changed_most_and_holds_all(figures: Figures, dynamic_run: Path):
    run = read_run(dynamic_run)
    change = {layer.name: run.final_ranks[layer.name] - 8 for layer in run.layers}
    ordered = sorted(change.values(), reverse=True)
    assert [change[layer.name] for layer in notable(run)] == ordered[:3] + ordered[-3:]
    ranks, places = figures["history"].panels
    assert len(drawn(ranks.spec)) == 6 and len(ranks.spec["data"]["values"]) == 36
    for panel in (ranks, places):
        assert {row["name"] for row in panel.spec["data"]["values"]} == set(figures["history"].layers)
    scores = run.adjustments[0]["layer_scores"]
    best = max(run.layers, key=lambda layer: scores[layer.name])
    assert next(row["y"][0] for row in places.spec["data"]["values"] if row["name"] == best.short_name) == 1


def test_moves_count_what_was_added_and_pruned(figures: Figures, dynamic_run: Path):
    bars = drawn(figures["moves"].panels[0].spec)
    adjustments = read_run(dynamic_run).adjustments
    assert bars["added"]["y"] == [sum(record["added"].values()) for record in adjustments]
    assert bars["pruned"]["y"] == [-len(record["pruned"]) for record in adjustments]


def test_several_runs_share_axes_and_keep_their_colours(dynamic_run: Path, lora_run: Path):
    figures = figures_of(dynamic_run, lora_run)
    held_out, total = figures["loss"].panels[1].spec, figures["parameters"].panels[1].spec
    assert list(drawn(held_out)) == ["demo", "lora"] and list(drawn(total)) == ["demo"]
    for spec in (held_out, total):
        domains = [
            layer["encoding"]["color"]["scale"]["domain"] for layer in spec["layer"] if "color" in layer["encoding"]
        ]
        assert domains and all(domain == ["demo", "lora"] for domain in domains)


def test_the_grey_stretches_are_those_without_adjustments_and_explained(figures: Figures, dynamic_run: Path):
    assert fixed(read_run(dynamic_run)) == [(0, 50), (240, 400)]
    for figure in figures.values():
        layers = [layer for panel in figure.panels for layer in panel.spec["layer"]]
        grey = any(layer["mark"].get("style") == "fixed" for layer in layers)
        assert grey == ("Grey: the steps" in figure.caption), figure.id


def test_a_run_in_which_nothing_moved_says_so(still_run: Path):
    figures = figures_of(still_run)
    assert "No rank was added or pruned." in figures["moves"].caption
    assert "No layer changed its rank." in figures["history"].caption


def test_bands_are_quartiles_over_the_layers(figures: Figures, dynamic_run: Path):
    row = drawn(figures["gradients"].panels[0].spec)["E"]
    snapshot = next(s for s in read_run(dynamic_run).snapshots if s["step"] == row["x"][3])
    norms = sorted(three[1] for three in snapshot["grad_norms"].values())
    # Of 36 sorted values the quartiles lie at 8.75, 17.5 and 26.25.
    expected = [norms[8] / 4 + norms[9] * 3 / 4, (norms[17] + norms[18]) / 2, norms[26] * 3 / 4 + norms[27] / 4]
    assert [row[key][3] for key in ("low", "y", "high")] == pytest.approx(expected)

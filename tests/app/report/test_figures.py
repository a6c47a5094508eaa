"""What the figures hold, checked against the records they are made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pedyra.app.report import tables
from pedyra.app.report.chart import Spec
from pedyra.app.report.figure import fixed
from pedyra.app.report.figures import make_figures
from pedyra.app.report.rank_figures import notable
from pedyra.app.report.run_folder import read_run, read_runs

ALL = "map history moves loss effective-rank variance spearman orthogonality gradients parameters".split()
Figures = dict[str, Any]


def figures_of(*folders: Path) -> Figures:
    return {figure.id: figure for figure in make_figures(read_runs(folders))[0]}


def drawn(spec: Spec) -> dict[str, Any]:
    """Name -> row of the curves in the foreground."""
    return {row["name"]: row for row in spec["data"]["values"] if row["kind"] == "drawn"}


@pytest.fixture(scope="module")
def figures(dynamic_run: Path) -> Figures:
    return figures_of(dynamic_run)


def test_a_dynamic_run_has_every_figure(figures: Figures):
    assert list(figures) == ALL
    papers = {name: figure.paper for name, figure in figures.items() if figure.paper}
    assert papers == {
        "map": "Fig. 7",
        "history": "Fig. 3",
        "effective-rank": "Fig. 1a",
        "variance": "Fig. 5",
        "spearman": "Fig. 4b",
        "orthogonality": "Fig. 10",
        "gradients": "Fig. 11",
    }


def test_what_a_plain_lora_run_did_not_record_is_left_out_with_a_line_each(lora_run: Path):
    (figure,), absent = make_figures(read_runs([lora_run]))
    assert [panel.title for panel in figure.panels] == ["Training loss", "Held-out loss", "Held-out accuracy"]
    assert len(absent) == len(ALL) + 1  # all but the loss; the two of a fit, which neither run had, are more
    assert "Rank of every layer: needs ranks.jsonl, which only rank-adaptive methods write." in absent


def test_a_run_that_was_fitted_shows_what_each_size_costs(lora_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    sizes = ((1000, 1.0, 0.0, 0.0, 0.0), (500, 0.5, 0.01, 0.02, 0.01), (100, 0.1, 0.3, 0.25, 0.02))
    keys = ("parameters", "share", "predicted_increase", "measured_increase", "standard_error")
    rows = [dict(zip(keys, size, strict=True)) | {"tolerance": 0.05, "chosen": size[0] == 500} for size in sizes]
    rows[2] |= {"recovered_increase": 0.1, "recovered_standard_error": 0.01}
    (run / "fit").mkdir()
    (run / "fit" / "pedyra_fit_curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = figures_of(run)["fit"]
    (panel,) = figure.panels
    curves = drawn(panel.spec)
    assert curves["measured"]["y"] == [0.02, 0.25] and curves["predicted"]["y"] == [0.01, 0.3]
    assert curves["measured"]["low"] == pytest.approx([0.0004, 0.2108])  # 1.96 standard errors
    recovered = curves["after recovery"]
    assert (recovered["x"], recovered["y"], recovered["high"]) == ([100], [0.1], [pytest.approx(0.1196)])
    assert figure.caption.endswith("Taken: 500 parameters (50%).")
    (panel,) = figures_of(run)["calibration"].panels
    (curve,) = drawn(panel.spec).values()
    assert (curve["x"], curve["y"]) == ([0.01, 0.3], [0.02, 0.25])
    assert panel.spec["layer"][0]["data"]["values"] == [{"x": 0.01, "y": 0.01}, {"x": 0.3, "y": 0.3}]


def test_a_fit_in_the_run_shows_what_was_asked_and_what_was_found(still_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(still_run, run)
    keys = ("parameters", "share", "answer", "predicted_increase", "measured_increase", "standard_error")
    sizes = (
        (600, 0.6, "within", 0.01, 0.02, 0.01),
        (100, 0.1, "beyond", 0.3, 0.25, 0.02),
        (300, 0.3, "beyond", 0, 0, None),
    )
    points = [dict(zip(keys, size, strict=True)) | {"of": 1000, "tolerance": 0.05} for size in sizes]
    header, *records = map(json.loads, (run / "ranks.jsonl").read_text().splitlines())
    found = {"state": "cut", "words": "flat: r = 8 is 4 times what this task needs", "points": points}
    last = max(record["step"] for record in records if record["kind"] == "adjustment")
    for record in records:
        record |= {"fit": found} if record["kind"] == "adjustment" and record["step"] == last else {}
    (run / "ranks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [header, *records]))
    (panel,) = figures_of(run)["fit"].panels
    curves = drawn(panel.spec)
    (points,) = drawn(figures_of(run)["calibration"].panels[0].spec).values()
    assert sorted(points["y"]) == [0.02, 0.25]
    assert sorted(curves["measured"]["y"]) == [0.02, 0.25]  # one batch alone says nothing, and is left out
    size = next(fact for fact in tables.facts(read_run(run)) if fact.name == "Size")
    assert (size.value, size.detail) == ("flat", "r = 8 is 4 times what this task needs")


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


def test_the_grey_stretches_are_those_without_adjustments(figures: Figures, dynamic_run: Path):
    assert fixed(read_runs([dynamic_run])) == [(0, 50), (240, 400)]
    for name, has_them in (("loss", True), ("spearman", False)):
        layers = [layer for panel in figures[name].panels for layer in panel.spec["layer"]]
        assert any(layer["mark"].get("style") == "fixed" for layer in layers) == has_them


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

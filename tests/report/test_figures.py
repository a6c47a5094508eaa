"""What the figures hold, checked against the records they are made from."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import variance

import pytest

from pedyra.report.capacity_figures import variance_points
from pedyra.report.chart import Chart, Phase, RankMap
from pedyra.report.figures import make_figures
from pedyra.report.rank_figures import notable
from pedyra.report.run_folder import read_run, read_runs

ALL = "map trajectories moves reasons loss effective-rank variance spearman orthogonality gradients parameters".split()


@pytest.fixture(scope="module")
def figures(dynamic_run: Path) -> dict:
    return {figure.id: figure for figure in make_figures(read_runs([dynamic_run]))}


def test_a_dynamic_run_has_every_figure(figures: dict):
    assert list(figures) == ALL
    papers = {name: figure.paper for name, figure in figures.items() if figure.paper}
    assert papers == {
        "map": "Fig. 7",
        "trajectories": "Fig. 3",
        "effective-rank": "Fig. 1a",
        "variance": "Fig. 5",
        "spearman": "Fig. 4b",
        "orthogonality": "Fig. 10",
        "gradients": "Fig. 11",
    }


def test_a_plain_lora_run_has_its_loss_and_metric(lora_run: Path):
    (figure,) = make_figures(read_runs([lora_run]))
    assert [panel.title for panel in figure.panels] == ["Training loss", "Held-out loss", "Held-out accuracy"]


def test_every_axis_is_labelled_and_every_figure_explained(figures: dict):
    for figure in figures.values():
        assert len(figure.caption) > 60
        assert all(panel.x_label and panel.y_label for panel in figure.panels if isinstance(panel, Chart))


def test_the_map_has_the_start_and_one_frame_per_adjustment(figures: dict, dynamic_run: Path):
    (panel,) = figures["map"].panels
    assert isinstance(panel, RankMap)
    run = read_run(dynamic_run)
    assert [frame.step for frame in panel.frames] == [0, *(record["step"] for record in run.adjustments)]
    assert all(rank == 8 for row in panel.frames[0].cells for rank in row)
    name = "bert.encoder.layer.5.intermediate.dense"
    row, column = panel.types.index("intermediate"), panel.depths.index(5)
    assert panel.frames[-1].cells[row][column] == run.adjustments[-1]["ranks"][name]
    assert sum(frame.changes[row][column] or 0 for frame in panel.frames) == run.adjustments[-1]["ranks"][name] - 8


def test_trajectories_bring_out_the_layers_that_changed_most(dynamic_run: Path):
    run = read_run(dynamic_run)
    change = {layer.name: run.final_ranks[layer.name] - 8 for layer in run.layers}
    shown = [change[layer.name] for layer in notable(run)]
    ordered = sorted(change.values(), reverse=True)
    assert shown == ordered[:3] + ordered[-3:]


def test_several_runs_share_axes_where_they_can(dynamic_run: Path, lora_run: Path):
    figures = {figure.id: figure for figure in make_figures(read_runs([dynamic_run, lora_run]))}
    held_out = figures["loss"].panels[1]
    assert isinstance(held_out, Chart)
    assert [(series.name, series.color) for series in held_out.series] == [("demo", 0), ("lora", 1)]


def test_the_phases_are_the_stretches_without_adjustments(figures: dict):
    assert figures["loss"].panels[0].phases == [Phase(0, 50), Phase(240, 400)]


def test_the_variance_uses_the_ranks_in_force_before_the_adjustment(dynamic_run: Path):
    run = read_run(dynamic_run)
    scores = run.adjustments[1]["layer_scores"]
    before = run.adjustments[0]["ranks"]
    expected = math.log(variance(scores[name] ** (2 / 3) / before[name] for name in scores))
    assert dict(variance_points(run))[60] == pytest.approx(expected)

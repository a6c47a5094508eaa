"""Draws the figures of docs and research that are made from rows: python docs/figures.py"""

from __future__ import annotations

from math import log10
from statistics import mean
from typing import Any

import altair as alt
from tables import DOCS, rows

from pedyra.app.report.chart import Axes, Curve, curves, rank_map
from pedyra.app.report.figures import map_cells
from pedyra.app.report.images import save_image, side_by_side
from pedyra.lora.layer_names import layer_place


def forgetting() -> None:
    """The loss of general text against that of the task, both less the base model's or the whole adapter's, as means
    over the runs: the whole adapter scaled down, without its intruders, and the fit."""
    every = rows("forgetting")
    whole = mean(row["loss"] for row in every if row["way"] == "whole")
    base = mean(row["general_loss"] for row in every if row["way"] == "base")

    def curve(name: str, *ways: str) -> Curve:
        points: dict[float, list[tuple[float, float]]] = {}
        for row in every:
            if row["way"] in ways:
                points.setdefault(-row["asked"], []).append((row["loss"] - whole, row["general_loss"] - base))
        means = [tuple(map(mean, zip(*points[key], strict=True))) for key in sorted(points)]
        return Curve(name, [x for x, _ in means], [y for _, y in means])

    axes = Axes("rise of the task's loss", "rise of the loss of English and code", line_at=("base model", 0.0))
    drawn = curves(
        [
            curve("scaled down", "whole", "scaled"),
            curve("without intruders", "whole", "intruders"),
            curve("pedyra fit --general", "fit"),
        ],
        axes,
    )
    save_image(side_by_side([("What is undone of what was forgotten", drawn)]), DOCS / "images" / "forgetting.png")


def orthogonality() -> None:
    """The error on planted ranks against gamma, in both forms of Eq. (2), and LoRA's."""
    design = [row for row in rows("planted_forms") if row["profile"] == "design" and row["architecture"] == "mlp"]
    lora = mean(row["relative_error"] for row in rows("planted") if row["method"] == "lora" and _same(row, design[0]))

    def curve(name: str, settings: str) -> Curve:
        errors: dict[float, list[float]] = {}
        for row in design:
            start = f"pedyra:start=svd,{settings}orth_weight="
            if row["method"].startswith(start) and row["method"].removeprefix(start).replace(".", "").isdigit():
                errors.setdefault(float(row["method"].removeprefix(start)), []).append(row["relative_error"])
        without = mean(row["relative_error"] for row in design if row["method"] == "pedyra:start=svd")
        points = {-5.0: without, **{log10(gamma): mean(each) for gamma, each in sorted(errors.items())}}
        return Curve(name, [*points], [*points.values()])

    axes = Axes("log10 of gamma (-5: switched off)", "error on planted ranks", line_at=("LoRA", round(lora, 3)))
    drawn = curves([curve("norm, as published", ""), curve("squared", "orth_form=squared,")], axes)
    save_image(side_by_side([("Eq. (2) through Adam", drawn)]), DOCS / "images" / "orthogonality.png")


def ratios() -> None:
    """The norm of Eq. (2)'s gradient over that of the task's, in the published form, over a run."""

    def curve(task: str, name: str) -> Curve:
        of_task = [row for row in rows("ratios") if row["task"] == task]
        return Curve(name, [row["step"] / row["of"] for row in of_task], [log10(row["ratio"]) for row in of_task])

    axes = Axes("part of the run", "log10 of the ratio", line_at=("equal", 0.0))
    names = {"planted ranks": "planted ranks", "qnli": "QNLI", "sst2": "SST-2"}
    drawn = curves([curve(*each) for each in names.items()], axes)
    save_image(side_by_side([("Eq. (2)'s gradient over the task's", drawn)]), DOCS / "images" / "ratios.png")


def ranks() -> None:
    """The ranks of the demo's adapter by kind of layer: over the steps, as means over the blocks, and by depth at the
    end; each began at 8."""
    (run,) = (row for row in rows("demo") if row["method"] == "pedyra")
    states = run["ranks"]
    places = {name: layer_place(name) for name in states["0"]}
    over_time = [
        {"type": kind, "depth": step, "ranks": [mean(state[name] for name in names)], "changes": [0]}
        for kind, names in _of_one_kind(places).items()
        for step, state in states.items()
    ]
    *_, end = states.values()
    at_the_end = map_cells(places, [states["0"], end])
    highest = max(end.values())
    panels = [
        rank_map(over_time, at="0", highest=highest, x="training step").properties(title="Mean rank over the blocks"),
        rank_map(at_the_end, at="1", highest=highest).properties(title="Rank of every layer at the end"),
    ]
    save_image(alt.vconcat(*panels), DOCS / "images" / "ranks.png")


def _of_one_kind(places: dict[str, tuple[str, int | None]]) -> dict[str, list[str]]:
    """The layers of each kind."""
    kinds: dict[str, list[str]] = {}
    for name, (kind, _) in places.items():
        kinds.setdefault(kind, []).append(name)
    return kinds


def _same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(row[key] == other[key] for key in ("profile", "architecture", "noise", "lr", "steps"))


if __name__ == "__main__":
    forgetting()
    orthogonality()
    ratios()
    ranks()

"""Draws the figures of docs and research that are made from rows: python docs/figures.py"""

from __future__ import annotations

from statistics import mean

from tables import DOCS, rows

from pedyra.app.report.chart import Axes, Curve, curves
from pedyra.app.report.images import save_image, side_by_side


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


if __name__ == "__main__":
    forgetting()

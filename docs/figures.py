"""Draws the figures of docs and research that are made from rows: python docs/figures.py"""

from __future__ import annotations

from statistics import mean

from tables import DOCS, rows

from pedyra.app.report.chart import Axes, Curve, curves
from pedyra.app.report.images import save_image, side_by_side


def forgetting() -> None:
    """The loss of general text against that of the task, both less the base model's or the whole adapter's, as means
    over the runs: the whole adapter scaled down, and cut to forget less."""
    every = rows("forgetting")
    whole = mean(row["loss"] for row in every if row["way"] == "whole")
    base = mean(row["general_loss"] for row in every if row["way"] == "base")

    def curve(name: str, way: str) -> Curve:
        found: dict[int, list[tuple[float, float]]] = {}
        for row in every:
            if row["way"] in ("whole", way):
                point = (row["loss"] - whole, row["general_loss"] - base)
                found.setdefault(-round(20 * row["amount"]), []).append(point)
        points = [(mean(x for x, _ in found[key]), mean(y for _, y in found[key])) for key in sorted(found)]
        return Curve(name, [x for x, _ in points], [y for _, y in points])

    axes = Axes("rise of the task's loss", "rise of the loss of English and code", line_at=("base model", 0.0))
    drawn = curves([curve("scaled down", "scaled"), curve("cut to forget less", "general")], axes)
    save_image(side_by_side([("What a cut undoes of what was forgotten", drawn)]), DOCS / "images" / "forgetting.png")


if __name__ == "__main__":
    forgetting()

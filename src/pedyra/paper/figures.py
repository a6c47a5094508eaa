"""The paper's figures, drawn by matplotlib in the paper's layout from the run folders of their rows.

Figure objects are used directly, with their own canvas, so that a caller's plots and settings stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pedyra.paper import measures
from pedyra.paper.item import Item
from pedyra.paper.results import Result
from pedyra.report.measures import importance_ranks, spearman, utilisation
from pedyra.report.run_folder import Run, read_run

Runs = Mapping[str, Sequence[Run]]
"""Row -> its runs, one a seed; curves show the first."""
Draw = Callable[[Figure, Runs, Sequence[Result]], None]

WIDTH, HEIGHT = 4.4, 3.2  # inches, of a panel
RESOLUTION = 200  # dots per inch of the PNG
FORMATS = ("svg", "png")
SHOWN = 5
"""Layers brought out in Figure 3: about as many as the paper shows."""


def save_figure(item: Item, found: Sequence[Result], runs: Mapping[str, Sequence[Path]], folder: Path) -> list[Path]:
    """Write `<id>.svg` and `.png`; the files. Nothing where no run is there to draw."""
    read = {row: [read_run(path) for path in paths] for row, paths in runs.items() if paths}
    if not read:
        return []
    draw, panels = FIGURES[item.id]
    canvas = Figure(figsize=(WIDTH * panels, HEIGHT), layout="constrained")
    FigureCanvasAgg(canvas)
    draw(canvas, read, found)
    files = [folder / f"{item.id}.{suffix}" for suffix in FORMATS]
    for file in files:
        canvas.savefig(file, dpi=RESOLUTION, metadata={"Title": item.title})
    return files


def _panel(canvas: Figure, place: tuple[int, int, int], title: str, x: str, y: str) -> Axes:
    axes = canvas.add_subplot(*place)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _curves(axes: Axes, curves: Mapping[str, Iterable[tuple[int, float]]], marker: str = "") -> None:
    for label, points in curves.items():
        steps, values = zip(*points, strict=True) if (points := list(points)) else ((), ())
        axes.plot(steps, values, label=label, marker=marker, markersize=3, linewidth=1.3)
    axes.legend(fontsize=8, frameon=False)


def effective_rank(canvas: Figure, runs: Runs, found: Sequence[Result]) -> None:
    """Fig. 1a: effective rank, and its share of the ranks, over the steps."""

    def recorded(run: Run) -> list[dict[str, Any]]:
        return [record for record in run.snapshots if record.get("effective_rank")]

    left = _panel(canvas, (1, 2, 1), "Effective rank", "step", "sum over layers")
    _curves(
        left,
        {row: [(r["step"], sum(r["effective_rank"].values())) for r in recorded(own[0])] for row, own in runs.items()},
    )
    right = _panel(canvas, (1, 2, 2), "Utilisation", "step", "effective rank / rank")
    shares = {
        row: [(r["step"], utilisation(r["effective_rank"], r["ranks"]) or 0.0) for r in recorded(own[0])]
        for row, own in runs.items()
    }
    _curves(right, shares)


def stability(canvas: Figure, runs: Runs, found: Sequence[Result]) -> None:
    """Fig. 1b: correlation of the layers' ranking with that of the adjustment before."""
    axes = _panel(canvas, (1, 1, 1), "Stability of the importance ranking", "step", "Spearman to the adjustment before")
    _curves(axes, {row: measures.stabilities(own[0]) for row, own in runs.items()}, marker="o")


def dynamics(canvas: Figure, runs: Runs, found: Sequence[Result]) -> None:
    """Fig. 3: (a) rank and (b) place by importance, of the layers whose rank changed most."""
    run = next(iter(runs.values()))[0]
    change = {name: run.final_ranks[name] - rank for name, rank in run.start_ranks.items()}
    order = sorted(change, key=lambda name: change[name])
    shown = list(dict.fromkeys([*order[-3:][::-1], *order[: SHOWN - 3]]))
    ranks = {
        name: [(0, run.start_ranks[name]), *((r["step"], r["ranks"][name]) for r in run.adjustments)] for name in shown
    }
    left = _panel(canvas, (1, 2, 1), "(a) Rank dynamics", "step", "rank")
    _curves(left, {_short(name): points for name, points in ranks.items()})
    places = [(record["step"], importance_ranks(record["layer_scores"])) for record in run.adjustments]
    right = _panel(canvas, (1, 2, 2), "(b) Importance ranking", "step", "place, 1 = most important")
    right.invert_yaxis()
    _curves(right, {_short(name): [(step, place[name]) for step, place in places] for name in shown})


def bars(canvas: Figure, runs: Runs, found: Sequence[Result]) -> None:
    """Figs. 4a and 6: one group of bars a column, one bar a row, with 95 % intervals."""
    measured = [result for result in found if result.measured is not None]
    columns, rows = (list(dict.fromkeys(getattr(r, key) for r in measured)) for key in ("column", "row"))
    axes = _panel(canvas, (1, 1, 1), "", "", "score")
    width = 0.8 / max(1, len(rows))
    for index, row in enumerate(rows):
        own = {result.column: result for result in measured if result.row == row}
        heights = [own[column].measured or 0.0 if column in own else 0.0 for column in columns]
        ends = [
            (own[column].interval if column in own else None) or (h, h)
            for column, h in zip(columns, heights, strict=True)
        ]
        reach = [max(0.0, high - h) for (_, high), h in zip(ends, heights, strict=True)]
        at = np.arange(len(columns)) + index * width
        axes.bar(at, heights, width, label=row, yerr=reach if any(reach) else None, capsize=3)
    axes.set_xticks(np.arange(len(columns)) + 0.4 - width / 2, columns)
    lowest = min((result.measured for result in measured if result.measured is not None), default=0.0)
    axes.set_ylim(bottom=max(0.0, lowest - 10))  # the paper's axes do not begin at zero either
    axes.legend(fontsize=8, frameon=False)


def rank_against_importance(canvas: Figure, runs: Runs, found: Sequence[Result]) -> None:
    """Fig. 4b: mean rank of each layer against its mean place by importance."""
    axes = _panel(canvas, (1, 1, 1), "", "mean place by importance, 1 = most important", "mean rank")
    for row, own in runs.items():
        places, ranks = measures.mean_places(own[0]), measures.mean_ranks(own[0])
        value = spearman([-place for place in places.values()], [ranks[name] for name in places])
        label = row if value is None else f"{row}, Spearman {value:.2f}"
        axes.scatter(list(places.values()), [ranks[name] for name in places], s=14, label=label)
    axes.legend(fontsize=8, frameon=False)


def log_variance(canvas: Figure, runs: Runs, found: Sequence[Result]) -> None:
    """Fig. 5: log variance over layers of G^(2/3) / r."""
    axes = _panel(canvas, (1, 1, 1), "Cross-layer variance of $G^{2/3}/r$", "step", "log variance")
    _curves(axes, {row: measures.log_variances(own[0]) for row, own in runs.items()})


def rank_maps(canvas: Figure, runs: Runs, found: Sequence[Result]) -> None:
    """Fig. 7: final rank by module type and depth, one map a row."""
    largest = max(max(own[0].final_ranks.values()) for own in runs.values())
    for index, (row, own) in enumerate(runs.items(), start=1):
        run = own[0]
        types = list(dict.fromkeys(layer.type for layer in run.layers))
        depths = sorted({layer.depth for layer in run.layers}, key=lambda depth: (depth is None, depth))
        cells = np.full((len(types), len(depths)), np.nan)
        for layer in run.layers:
            cells[types.index(layer.type), depths.index(layer.depth)] = run.final_ranks[layer.name]
        axes = _panel(canvas, (1, len(runs), index), f"({'ab'[index - 1]}) {row}", "layer", "")
        axes.imshow(cells, cmap="Blues", vmin=0, vmax=largest, aspect="auto")
        axes.set_yticks(range(len(types)), types, fontsize=7)
        axes.set_xticks(range(len(depths)), ["" if depth is None else str(depth) for depth in depths], fontsize=7)
        for (y, x), rank in np.ndenumerate(cells):
            if np.isfinite(rank):
                dark = rank > 0.6 * largest
                axes.text(x, y, f"{rank:.0f}", ha="center", va="center", fontsize=6, color="w" if dark else "k")


def masks(canvas: Figure, runs: Runs, found: Sequence[Result]) -> None:
    """Fig. 8: the triples that are masked after each adjustment, a panel for each weighting; in red, come back."""
    for index, (row, own) in enumerate(runs.items(), start=1):
        masked = measures.masks(own[0])
        ever = sorted(set().union(*(each for _, each in masked)))
        state = np.array([[triple in each for _, each in masked] for triple in ever], dtype=float)
        if not state.size:
            continue
        axes = _panel(canvas, (1, len(runs), index), f"({'ab'[index - 1]}) {row}", "adjustment", "triple")
        axes.imshow(state, cmap="Greys", vmin=0, vmax=1.6, aspect="auto", interpolation="nearest")
        y, x = np.nonzero((state[:, :-1] == 1) & (state[:, 1:] == 0))
        axes.scatter(x + 1, y, s=9, color="tab:red", label=f"came back: {len(x)}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=8, loc="upper left")


def losses(canvas: Figure, runs: Runs, found: Sequence[Result]) -> None:
    """Fig. 9: training loss."""
    axes = _panel(canvas, (1, 1, 1), "Training loss", "step", "loss")
    _curves(axes, {row: measures.training_losses(own[0]) for row, own in runs.items()})


def orthogonality(canvas: Figure, runs: Runs, found: Sequence[Result]) -> None:
    """Fig. 10: the term of (a) one layer's A, the first feed-forward's as in the paper, and (b) all factors."""
    run = next(iter(runs.values()))[0]
    names = [layer.name for layer in run.layers]
    name = next((name for name in names if "intermediate" in name), names[0])
    left = _panel(canvas, (1, 2, 1), f"(a) A of {_short(name)}", "step", "R")
    _curves(left, {"A": [(record["step"], record["orthogonality"][name][0]) for record in run.snapshots]})
    right = _panel(canvas, (1, 2, 2), "(b) all factors", "step", "R")
    _curves(right, {"mean": measures.orthogonalities(run)})


def gradients(canvas: Figure, runs: Runs, found: Sequence[Result]) -> None:
    """Fig. 11: norms of the gradients of A, E and B, averaged over layers."""
    points = list(measures.gradient_norms(next(iter(runs.values()))[0]))
    axes = _panel(canvas, (1, 1, 1), "Gradients of the factors", "step", "mean norm")
    axes.set_yscale("log")
    curves = {
        f"‖∇{name}‖": [(s, norms[i]) for s, norms in points if norms[i] > 0] for i, name in enumerate(measures.FACTORS)
    }
    _curves(axes, curves)


FIGURES: dict[str, tuple[Draw, int]] = {
    "figure1a": (effective_rank, 2),
    "figure1b": (stability, 1),
    "figure3": (dynamics, 2),
    "figure4a": (bars, 1),
    "figure4b": (rank_against_importance, 1),
    "figure5": (log_variance, 1),
    "figure6": (bars, 1),
    "figure7": (rank_maps, 2),
    "figure8": (masks, 2),
    "figure9": (losses, 1),
    "figure10": (orthogonality, 2),
    "figure11": (gradients, 1),
}
"""Id -> what draws it, and its panels side by side."""


def _short(name: str) -> str:
    """layer10.intermediate of deberta.encoder.layer.10.intermediate.dense, as the paper calls it."""
    parts = [part for part in name.split(".") if part != "dense"]
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return name if number is None else f"layer{parts[number]}.{'.'.join(parts[number + 1 :])}"

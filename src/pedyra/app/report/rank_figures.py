"""Where the ranks are, and how they got there: the map, the history, what was added and pruned."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pedyra.app.report.measures as measures
from pedyra.app.report.chart import Axes, Curve, bars, curves, rank_map
from pedyra.app.report.figure import STEP, Figure, Panel, adjusted, fixed, mean, titled
from pedyra.app.report.run_folder import Layer, Record, Run

GREY = "Grey: the steps before the first adjustment and after the last, in which all ranks stay."
SHOWN = 3  # layers in colour at each end of the ranking by change of rank


def ranks_over_steps(runs: Sequence[Run]) -> Figure:
    """Ranks as module type by depth, one frame per adjustment (Fig. 7 over time)."""
    caption = (
        "Each cell is one adapted layer of the model and shows its rank, that is how many directions it may learn; "
        "the stronger the colour, the higher. The slider goes through the adjustments; ▲ gained ranks, ▼ lost some."
    )
    panels = [_map(run, titled(runs, run, "Module type by depth in the model")) for run in runs if run.layers]
    return Figure("map", "Ranks", "Rank of every layer", caption, panels)


def history(runs: Sequence[Run]) -> Figure:
    """Rank and place by importance of every layer, two panels per run (Fig. 3)."""
    panels, findings = [], []
    for run in adjusted(runs):
        shown = notable(run)
        findings.append(titled(runs, run, _changes(run, shown)))
        steps, states = _states(run)
        at = [record["step"] for record in run.adjustments]
        places = [measures.importance_ranks(record["layer_scores"]) for record in run.adjustments]
        for title, y, x, values, ranking in (
            ("Rank", "rank", steps, states, False),
            ("Place by importance", "place (1 = most important)", at, places, True),
        ):
            lines = {layer: Curve(layer.short_name, x, [v[layer.name] for v in values]) for layer in run.layers}
            quiet = [replace(line, kind="quiet") for layer, line in lines.items() if layer not in shown]
            coloured, held = [lines[layer] for layer in shown], fixed(run)
            up = not ranking
            spec = curves([*coloured, *quiet], Axes(STEP, y, fixed=held, step=up, from_zero=up, reverse=ranking))
            panels.append(Panel(titled(runs, run, title), spec, {"brought": ""}))
    caption = (
        "One line a layer: its rank, and its place among all layers by importance, the mean of the scores by which the "
        "method ranks its directions. In colour the layers whose rank changed most; any one can be brought out by "
        f"name. {GREY} {' '.join(findings)}"
    )
    names = sorted({layer.short_name for run in adjusted(runs) for layer in run.layers}, key=_natural)
    title = "Rank and importance of each layer over time"
    return Figure("history", "Ranks", title, caption, panels, names)


def moves(runs: Sequence[Run]) -> Figure:
    """Triples added (up) and pruned (down) at each adjustment, and the mean rank of each type, per run."""
    panels, still = [], []
    for run in adjusted(runs):
        steps = [record["step"] for record in run.adjustments]
        added = [sum(record["added"].values()) for record in run.adjustments]
        pruned = [-len(record["pruned"]) for record in run.adjustments]
        if not any(added) and not any(pruned):
            still.append(titled(runs, run, "No rank was added or pruned."))
        spec = bars([Curve("added", steps, added), Curve("pruned", steps, pruned)], STEP, "ranks", fixed=fixed(run))
        panels.append(Panel(titled(runs, run, "Ranks added and pruned"), spec))
        steps, states = _states(run)
        means = [
            Curve(kind, steps, [mean(state[layer.name] for layer in layers) for state in states])
            for kind, layers in by_type(run.layers).items()
        ]
        spec = curves(means, Axes(STEP, "mean rank", step=True, from_zero=True, fixed=fixed(run)))
        panels.append(Panel(titled(runs, run, "Mean rank by module type"), spec))
    caption = (
        "How many ranks each adjustment added (up) and took away (down), and what that made of each kind of layer. "
        f"The table below names the layers. {GREY} {' '.join(still)}"
    )
    return Figure("moves", "Ranks", "Ranks added and pruned, and when", caption, panels)


def notable(run: Run) -> list[Layer]:
    """The layers that gained most, then those that lost most: at most `SHOWN` each, only layers that changed."""
    change = {layer.name: run.final_ranks[layer.name] - layer.rank for layer in run.layers}
    by_change = sorted(run.layers, key=lambda layer: -change[layer.name])
    gained = [layer for layer in by_change[:SHOWN] if change[layer.name] > 0]
    return gained + [layer for layer in by_change[-SHOWN:] if change[layer.name] < 0]


def by_type(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Module type -> its layers, in the order of the model."""
    types: dict[str, list[Layer]] = {}
    for layer in layers:
        types.setdefault(layer.type, []).append(layer)
    return types


def _map(run: Run, title: str) -> Panel:
    states = [run.start_ranks, *(record["ranks"] for record in run.adjustments)]
    changes = [{name: rank - before[name] for name, rank in after.items()} for before, after in pairwise(states)]
    places: dict[tuple[str, str], list[str]] = {}
    depths = sorted({layer.depth for layer in run.layers}, key=lambda depth: (depth is None, depth))
    for depth in depths:  # the order of the columns is that in which they are first named
        for layer in run.layers:
            if layer.depth == depth:
                places.setdefault((layer.type, "–" if depth is None else str(depth)), []).append(layer.name)
    cells = [
        {"type": kind, "depth": depth}
        | {"ranks": [mean(state[name] for name in names) for state in states]}
        | {"changes": [0, *(sum(change[name] for name in names) for change in changes)]}
        for (kind, depth), names in places.items()
    ]
    told = [f"Start: {_total(run.start_ranks, run.header.get('budget'))}"]
    for number, record in enumerate(run.adjustments, start=1):
        moved = f"{len(record['pruned'])} pruned, {sum(record['added'].values())} added"
        where = f"Adjustment {number} of {len(run.adjustments)}, step {record['step']:,}"
        told.append(f"{where}: {moved}; {_total(record['ranks'], record)}")
    last = len(told) - 1
    stills = [(f"{title}, start", rank_map(cells, at="0")), (f"{title}, end", rank_map(cells, at=str(last)))]
    return Panel(title, rank_map(cells), {"adjustment": last}, told, stills if last else stills[:1])


def _total(ranks: Mapping[str, int], record: Record | None) -> str:
    parameters = (record or {}).get("parameters")
    return f"total rank {sum(ranks.values()):,}" + (f", {parameters:,} parameters" if parameters else "")


def _states(run: Run) -> tuple[list[int], list[Mapping[str, int]]]:
    """The ranks at step 0, after each adjustment and, unchanged, at the end of the schedule."""
    steps = [0, *(record["step"] for record in run.adjustments)]
    states = [run.start_ranks, *(record["ranks"] for record in run.adjustments)]
    end = (run.header.get("schedule") or {}).get("total_steps") or steps[-1]
    return ([*steps, end], [*states, states[-1]]) if end > steps[-1] else (steps, states)


def _changes(run: Run, shown: Sequence[Layer]) -> str:
    parts = []
    for verb, sign in (("Gained", 1), ("Lost", -1)):
        moved = [(layer, run.final_ranks[layer.name]) for layer in shown]
        told = [f"{layer.short_name} ({layer.rank} → {end})" for layer, end in moved if sign * (end - layer.rank) > 0]
        parts += [f"{verb} most: {', '.join(told)}."] if told else []
    return " ".join(parts) or "No layer changed its rank."


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts "query 10" after "query 2"."""
    return [(int(part or 0), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]

"""Where the ranks are and how they got there: the map, the trajectories, the moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pedyra.report.chart import Chart, Figure, Frame, RankMap, Series, Value
from pedyra.report.curves import STEP, color, figure, listed, mean, phases
from pedyra.report.layers import Layer
from pedyra.report.measures import importance_ranks, rank_matrix
from pedyra.report.run_folder import Record, Run

SHOWN = 3  # layers brought out at each end of the ranking by change of rank


def rank_map(runs: Sequence[Run]) -> Figure | None:
    """Ranks as module type x depth, one frame per adjustment (Fig. 7 over time)."""
    maps = [_map(run, run.label if len(runs) > 1 else "Rank") for run in runs if run.layers]
    caption = (
        "Rank of every adapted layer, module type by depth in the model. Move the slider to go through the "
        "adjustments; an outlined layer gained (▲) or lost (▼) ranks at that one."
        if any(len(each.frames) > 1 for each in maps)
        else "Rank of every adapted layer, module type by depth in the model. This run makes no adjustments."
    )
    return figure("map", "Rank allocation", "Rank by module type and depth", caption, maps, "Fig. 7")


def trajectories(runs: Sequence[Run]) -> Figure | None:
    """Rank and place in the importance ranking of every layer, two panels per run (Fig. 3)."""
    panels, findings = [], []
    for run in runs:
        if not run.adjustments:
            continue
        shown = notable(run)
        prefix = f"{run.label}: " if len(runs) > 1 else ""
        changes = {name: run.final_ranks[name] - rank for name, rank in run.start_ranks.items()}
        findings.append(prefix + _finding(shown, run, changes))
        slots = {layer.name: index for index, layer in enumerate(shown)}
        panels.append(_rank_chart(run, slots, f"{prefix}rank" if prefix else "Rank"))
        panels.append(_place_chart(run, slots, f"{prefix}importance ranking" if prefix else "Importance ranking"))
    caption = (
        "Rank of each layer, and its place by importance at each adjustment (1 = most important). In colour the layers "
        f"whose rank changed most, in grey the others; any one can be brought out by name. {' '.join(findings)}"
    )
    title = "Rank and importance ranking of each layer"
    return figure("trajectories", "Rank allocation", title, caption, panels, "Fig. 3", highlight=True)


def moves(runs: Sequence[Run]) -> Figure | None:
    """Triples added (up) and pruned (down) at each adjustment, and the mean rank of each type, per run."""
    panels: list[Chart] = []
    still = []
    for run in runs:
        steps = [record["step"] for record in run.adjustments]
        if not steps:
            continue
        added = [sum(record["added"].values()) for record in run.adjustments]
        pruned = [-len(record["pruned"]) for record in run.adjustments]
        bars = [Series("added", steps, added, "bars", 0), Series("pruned", steps, pruned, "bars", 1)]
        prefix = f"{run.label}: " if len(runs) > 1 else ""
        if not any(added) and not any(pruned):
            still.append(f" {prefix}nothing moved." if prefix else " Nothing moved.")
        title = f"{prefix}triples moved" if prefix else "Triples moved"
        panels.append(Chart(title, STEP, "triples", bars, from_zero=True, phases=phases([run])))
        panels.append(_type_chart(run, f"{prefix}mean rank by module type" if prefix else "Mean rank by module type"))
    caption = (
        "Triples added and pruned at each adjustment, and what that made of each module type. The table below tells "
        f"the layers they belong to.{''.join(still)}"
    )
    return figure("moves", "Rank allocation", "What was pruned and added, and when", caption, panels)


def notable(run: Run) -> list[Layer]:
    """The layers that gained most, then those that lost most: at most `SHOWN` each, only layers that changed."""
    change = {layer.name: run.final_ranks[layer.name] - layer.rank for layer in run.layers}
    by_change = sorted(run.layers, key=lambda layer: -change[layer.name])
    gained = [layer for layer in by_change[:SHOWN] if change[layer.name] > 0]
    return gained + [layer for layer in by_change[-SHOWN:] if change[layer.name] < 0]


def _map(run: Run, title: str) -> RankMap:
    types, depths, cells = rank_matrix(run.layers, run.start_ranks)
    frames = [Frame(0, _total(run.start_ranks, run.header.get("budget")), cells, _nothing(cells))]
    ranks = run.start_ranks
    for adjustment in run.adjustments:
        after = rank_matrix(run.layers, adjustment["ranks"])[2]
        change = rank_matrix(run.layers, {name: adjustment["ranks"][name] - ranks[name] for name in ranks})[2]
        text = f"{len(adjustment['pruned'])} pruned, {sum(adjustment['added'].values())} added; "
        frames.append(Frame(adjustment["step"], text + _total(adjustment["ranks"], adjustment), after, change))
        ranks = adjustment["ranks"]
    return RankMap(title, types, depths, frames)


def _nothing(cells: Sequence[Sequence[Value]]) -> list[list[Value]]:
    return [[None if cell is None else 0.0 for cell in row] for row in cells]


def _total(ranks: Mapping[str, int], record: Record | None) -> str:
    parameters = (record or {}).get("parameters")
    return f"total rank {sum(ranks.values()):,}" + (f", {parameters:,} parameters" if parameters else "")


def _rank_chart(run: Run, slots: Mapping[str, int], title: str) -> Chart:
    steps, states = _states(run)
    curves = [
        Series(layer.short_name, steps, [state[layer.name] for state in states], "step", slots.get(layer.name))
        for layer in run.layers
    ]
    return Chart(title, STEP, "rank", _coloured_last(curves), from_zero=True, phases=phases([run]))


def _type_chart(run: Run, title: str) -> Chart:
    steps, states = _states(run)
    curves = []
    for index, kind in enumerate(dict.fromkeys(layer.type for layer in run.layers)):
        members = [layer.name for layer in run.layers if layer.type == kind]
        means = [mean(state[name] for name in members) for state in states]
        curves.append(Series(kind, steps, means, "step", color(index)))
    return Chart(title, STEP, "mean rank", curves, from_zero=True, phases=phases([run]))


def _states(run: Run) -> tuple[list[int], list[Mapping[str, int]]]:
    """The ranks at step 0, after each adjustment and, unchanged, at the end of the schedule."""
    steps = [0, *(record["step"] for record in run.adjustments)]
    states = [run.start_ranks, *(record["ranks"] for record in run.adjustments)]
    end = (run.header.get("schedule") or {}).get("total_steps") or steps[-1]
    return ([*steps, end], [*states, states[-1]]) if end > steps[-1] else (steps, states)


def _place_chart(run: Run, slots: Mapping[str, int], title: str) -> Chart:
    steps = [record["step"] for record in run.adjustments]
    places = [importance_ranks(record["layer_scores"]) for record in run.adjustments]
    curves = [
        Series(layer.short_name, steps, [p[layer.name] for p in places], "line", slots.get(layer.name))
        for layer in run.layers
    ]
    label = "place by importance"
    return Chart(title, STEP, label, _coloured_last(curves), reverse_y=True, phases=phases([run]))


def _coloured_last(curves: list[Series]) -> list[Series]:
    """Colour on top of grey, and the legend in the order of the slots."""
    return sorted(curves, key=lambda series: -1 if series.color is None else series.color)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _finding(shown: list[Layer], run: Run, changes: Mapping[str, int]) -> str:
    def told(layer: Layer) -> str:
        return f"{layer.short_name} ({layer.rank} → {run.final_ranks[layer.name]})"

    gained = [told(layer) for layer in shown if changes[layer.name] > 0]
    lost = [told(layer) for layer in reversed(shown) if changes[layer.name] < 0]
    parts = ([f"gained most: {listed(gained)}"] if gained else []) + ([f"lost most: {listed(lost)}"] if lost else [])
    return _capital("; ".join(parts) or "no layer changed its rank") + "."

"""The tables of the page as text: facts of a run, its adjustments, its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pedyra.app.console import format_bytes, format_seconds
from pedyra.app.report import measures
from pedyra.app.report.records import RunRecords

ABSENT = "–"  # what a run did not record


@dataclass(frozen=True)
class Fact:
    """One property of a run: its value as text, and a second line that puts it in proportion."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; the first column names the row, those in `text` hold words rather than numbers."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: Sequence[int] = ()


def description(run: RunRecords) -> dict[str, str]:
    """What was run: method, model, data, seed, steps, LoRA settings; what the recipe does not say is left out."""
    recipe = run.recipe
    model, data, lora = (value if isinstance(value := recipe.get(k), dict) else {} for k in ("model", "data", "lora"))
    steps = (run.header.get("schedule") or {}).get("total_steps") or run.final.get("step")
    rows = {
        "Method": recipe.get("method"),
        "Model": _words(model, "name", "quantization"),
        "Data": _words(data, "source", "kind"),
        "LoRA": f"rank {lora['r']}, alpha {lora.get('alpha', ABSENT)}" if "r" in lora else None,
        "Steps": f"{steps:,}" if steps else None,
        "Seed": recipe.get("seed", run.environment.get("seed")),
    }
    return {name: str(value) for name, value in rows.items() if value not in (None, "")}


def facts(run: RunRecords) -> list[Fact]:
    """Result, size, rank, adjustments, time and memory: the cards of the header, the rows of a comparison.

    A value that is not known is `ABSENT`.
    """
    final = run.final
    metric = str(final.get("metric", "result")).replace("_", " ")
    name = metric[:1].upper() + metric[1:]
    loss = f"held-out loss {_number(final['eval_loss'])}" if isinstance(final.get("eval_loss"), int | float) else ""
    speed = final.get("train_steps_per_second")
    time, peak = _told(final.get("seconds"), format_seconds), _told(final.get("peak_memory_bytes"), format_bytes)
    return [
        Fact(name, _number(final.get("value")), loss if final else "the run is not finished"),
        Fact("Trainable parameters", _count(final.get("trainable_parameters")), _budget(run)),
        _rank_fact(run),
        _size_fact(run),
        _adjustment_fact(run),
        Fact("Training time", time, f"{speed:.2f} steps per second" if speed else ""),
        Fact("Peak memory", peak, str(run.environment.get("device", ""))),
    ]


def _size_fact(run: RunRecords) -> Fact:
    """The smaller adapter of a fit."""
    fit = run.fit
    if not fit:
        return Fact("Smaller adapter", ABSENT)
    if fit["share"] >= 1:
        return Fact("Smaller adapter", "none", "everything is kept")
    return Fact("Smaller adapter", f"{fit['parameters']:,}", f"parameters, {fit['share']:.0%} of the adapter")


def comparison(runs: Sequence[RunRecords]) -> Table:
    """One column a run: what was run, what came out; what no run recorded is left out."""
    described = [description(run) for run in runs]
    names = dict.fromkeys(name for each in described for name in each)
    rows = [[name, *(each.get(name, ABSENT) for each in described)] for name in names]
    for row in zip(*(facts(run) for run in runs), strict=True):
        if any(fact.value != ABSENT for fact in row):
            name = " / ".join(dict.fromkeys(fact.name for fact in row))
            rows.append([name, *(f"{fact.value} ({fact.detail})" if fact.detail else fact.value for fact in row)])
    return Table("Comparison of the runs", "", ["", *(run.label for run in runs)], rows, range(len(runs) + 1))


def adjustments(run: RunRecords) -> Table:
    """One row per adjustment: which layers lost and gained ranks, and what it left."""
    names = {layer.name: layer.short_name for layer in run.layers}
    rows = [
        [
            f"{record['step']:,}",
            _layers(measures.pruned_counts(record), names),
            _layers(record["added"], names),
            f"{sum(record['ranks'].values()):,}",
            _count(record.get("parameters")),
            f"{1000 * record['seconds']:.1f} ms" if "seconds" in record else ABSENT,
            str(record.get("skipped_steps", ABSENT)),
        ]
        for record in run.adjustments
    ]
    head = ["Step", "Pruned from", "Added to", "Total rank", "Parameters", "Time", "Steps skipped"]
    return Table(f"All {len(rows)} adjustments", "which layers lost and gained ranks", head, rows, (1, 2))


def layers(run: RunRecords) -> Table:
    """One row per layer: rank at start and end, ranks lost and gained, importance, effective rank."""
    pruned = [measures.pruned_counts(record) for record in run.adjustments]
    scores = measures.mean_by_layer([record["layer_scores"] for record in run.adjustments])
    places = [measures.importance_ranks(record["layer_scores"]) for record in run.adjustments]
    recorded = [snapshot["effective_rank"] for snapshot in run.snapshots if snapshot.get("effective_rank")]

    def shown(values: Mapping[str, float], name: str, form: str) -> str:
        return format(values[name], form) if name in values else ABSENT

    rows = [
        [
            layer.short_name,
            str(layer.rank),
            str(run.final_ranks[layer.name]),
            str(sum(counts.get(layer.name, 0) for counts in pruned)),
            str(sum(record["added"].get(layer.name, 0) for record in run.adjustments)),
            shown(scores, layer.name, ".3g"),
            shown(measures.mean_by_layer(places), layer.name, ".1f"),
            shown(recorded[-1] if recorded else {}, layer.name, ".2f"),
        ]
        for layer in run.layers
    ]
    head = ["Layer", "Rank at start", "at end", "Pruned", "Added", "Mean importance", "Mean place", "Effective rank"]
    return Table(f"All {len(rows)} layers", "ranks, importance", head, rows, (0,))


def _told(value: float | None, text: Callable[[float], str]) -> str:
    return ABSENT if value is None else text(value)


def _rank_fact(run: RunRecords) -> Fact:
    if not run.layers:
        return Fact("Total rank", ABSENT)
    start, end = sum(run.start_ranks.values()), sum(run.final_ranks.values())
    each = " to ".join(map(str, sorted({min(run.final_ranks.values()), max(run.final_ranks.values())})))
    value = f"{end:,}" if start == end else f"{start:,} → {end:,}"
    return Fact("Total rank", value, f"{len(run.layers)} layers of rank {each}")


def _adjustment_fact(run: RunRecords) -> Fact:
    if not run.adjustments:
        return Fact("Adjustments", ABSENT)
    pruned = sum(len(record["pruned"]) for record in run.adjustments)
    added = sum(sum(record["added"].values()) for record in run.adjustments)
    return Fact("Adjustments", str(len(run.adjustments)), f"{pruned} ranks pruned, {added} added")


def _budget(run: RunRecords) -> str:
    budget = run.header.get("budget") or {}
    states = [s for s in run.snapshots + run.adjustments if isinstance(s.get("parameters"), int)]
    if not budget.get("parameters") or not states:
        return ""
    whole = "its budget" if budget.get("kind") == "parameters" else "its start"
    held = max(states, key=lambda state: state["step"])["parameters"]
    return f"adapter {held:,}, {held / budget['parameters']:.1%} of {whole}"


def _layers(counts: Mapping[str, int], names: Mapping[str, str]) -> str:
    return ", ".join(f"{names[name]} ×{n}" if n > 1 else names[name] for name, n in counts.items() if n) or ABSENT


def _words(section: Mapping[str, Any], *keys: str) -> str:
    return ", ".join(str(section[key]) for key in keys if section.get(key) not in (None, "none"))


def _count(number: int | None) -> str:
    return ABSENT if number is None else f"{number:,}"


def _number(value: Any) -> str:
    """Four decimals, or four significant digits from 10 on: results of a table line up."""
    if not isinstance(value, int | float):
        return ABSENT
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"

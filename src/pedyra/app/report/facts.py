"""What the page tells as text: facts of a run, runs side by side, and the layers of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pedyra.app.console import format_bytes, format_seconds
from pedyra.app.report import measures
from pedyra.app.report.records import RunRecords

ABSENT = "–"  # what a run did not record


@dataclass(frozen=True)
class Fact:
    """One property of a run: its value as text, and a second line that puts it in proportion."""

    value: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.value} ({self.detail})" if self.detail else self.value


@dataclass(frozen=True)
class FactTable:
    """Rows of text under a head; the first column names the row, those in `text` hold words rather than numbers."""

    title: str
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


def facts(run: RunRecords) -> dict[str, Fact]:
    """Result, size, rank, adjustments, time and memory, as far as they are known."""
    final, found = run.final, {}
    if isinstance(final.get("value"), int | float):
        name = str(final.get("metric", "result")).replace("_", " ")
        loss = final.get("eval_loss")
        found[name[:1].upper() + name[1:]] = Fact(
            _number(final["value"]), "" if loss is None else f"held-out loss {_number(loss)}"
        )
    elif not final:
        found["Result"] = Fact(ABSENT, "the run is not finished")
    if final.get("trainable_parameters") is not None:
        found["Trainable parameters"] = Fact(f"{final['trainable_parameters']:,}", _budget(run))
    if run.layers:
        found["Total rank"] = _total_rank(run)
    if run.fit and run.fit["share"] < 1:
        share = f"parameters, {run.fit['share']:.0%} of the adapter"
        found["Smaller adapter"] = Fact(f"{run.fit['parameters']:,}", share)
    elif run.fit:
        found["Smaller adapter"] = Fact("none", "everything is kept")
    if run.adjustments:
        pruned = sum(len(record["pruned"]) for record in run.adjustments)
        added = sum(sum(record["added"].values()) for record in run.adjustments)
        found["Adjustments"] = Fact(str(len(run.adjustments)), f"{pruned} ranks pruned, {added} added")
    if final.get("seconds") is not None:
        speed = final.get("train_steps_per_second")
        found["Training time"] = Fact(
            format_seconds(final["seconds"]), f"{speed:.2f} steps per second" if speed else ""
        )
    if final.get("peak_memory_bytes") is not None:
        device = str(run.environment.get("device", ""))
        found["Peak memory"] = Fact(format_bytes(final["peak_memory_bytes"]), device)
    return found


def comparison(runs: Sequence[RunRecords]) -> FactTable:
    """One column a run: what was run, what came out; what no run recorded is left out."""
    columns: list[dict[str, Any]] = [{**description(run), **facts(run)} for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(str(column.get(name, ABSENT)) for column in columns)] for name in names]
    return FactTable("Comparison of the runs", ["", *(run.label for run in runs)], rows, range(len(runs) + 1))


def layers(run: RunRecords) -> FactTable:
    """One row per layer: rank at start and end, ranks lost and gained, importance, effective rank."""
    pruned, added = Counter[str](), Counter[str]()
    for record in run.adjustments:
        pruned.update(name for name, *_ in record["pruned"])
        added.update(record["added"])
    recorded = [snapshot["effective_rank"] for snapshot in run.snapshots if snapshot.get("effective_rank")]
    told: list[tuple[Mapping[str, float], str]] = [
        (measures.mean_by_layer([record["layer_scores"] for record in run.adjustments]), ".3g"),
        (measures.mean_places(run), ".1f"),
        (recorded[-1] if recorded else {}, ".2f"),
    ]
    rows = []
    for layer in run.layers:
        ranks = (layer.rank, run.final_ranks[layer.name], pruned[layer.name], added[layer.name])
        more = (format(values[layer.name], form) if layer.name in values else ABSENT for values, form in told)
        rows.append([layer.short_name, *map(str, ranks), *more])
    head = ["Layer", "Rank at start", "at end", "Pruned", "Added", "Mean importance", "Mean place", "Effective rank"]
    return FactTable(f"All {len(rows)} layers", head, rows, (0,))


def _total_rank(run: RunRecords) -> Fact:
    start, ends = sum(run.start_ranks.values()), run.final_ranks.values()
    each = " to ".join(map(str, sorted({min(ends), max(ends)})))
    value = f"{start:,}" if start == sum(ends) else f"{start:,} → {sum(ends):,}"
    return Fact(value, f"{len(run.layers)} layers of rank {each}")


def _budget(run: RunRecords) -> str:
    """The adapter's parameters at the end, by its budget."""
    budget = run.header.get("budget") or {}
    states = [s for s in run.snapshots + run.adjustments if isinstance(s.get("parameters"), int)]
    if not budget.get("parameters") or not states:
        return ""
    whole = "its budget" if budget.get("kind") == "parameters" else "its start"
    held = max(states, key=lambda state: state["step"])["parameters"]
    return f"adapter {held:,}, {held / budget['parameters']:.1%} of {whole}"


def _words(section: Mapping[str, Any], *keys: str) -> str:
    return ", ".join(str(section[key]) for key in keys if section.get(key) not in (None, "none"))


def _number(value: float) -> str:
    """Four decimals, or four significant digits from 10 on: results of a table line up."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"

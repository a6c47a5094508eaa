"""The tables of the page as text: facts of a run, adjustments, layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pedyra.report.capacity_figures import correlations, variance_points
from pedyra.report.curves import signed
from pedyra.report.measures import importance_ranks, mean_by_layer, pruned_counts, utilisation
from pedyra.report.run_folder import Run

ABSENT = "–"  # what a run did not record


@dataclass(frozen=True)
class Fact:
    """One property of a run: its value as text, and a second line that puts it in proportion."""

    name: str
    value: str
    detail: str = ""


def facts(run: Run) -> list[Fact]:
    """Result, size, rank, adjustments, time and memory: the cards of the header, the rows of a comparison."""
    final = run.final
    metric = str(final.get("metric", "result")).replace("_", " ")
    result = _number(final["value"]) if isinstance(final.get("value"), int | float) else ABSENT
    loss = f"held-out loss {_number(final['eval_loss'])}" if isinstance(final.get("eval_loss"), int | float) else ""
    speed = final.get("train_steps_per_second")
    rate = f"{speed:.2f} steps per second" if speed else ""
    return [
        Fact(_capital(metric), result, loss or ("" if final else "the run is not finished")),
        Fact("Trainable parameters", _count(final.get("trainable_parameters")), _budget(run)),
        _rank_fact(run),
        _adjustment_fact(run),
        Fact("Training time", duration(final.get("seconds")), rate),
        Fact("Peak memory", memory(final.get("peak_memory_bytes")), str(run.environment.get("device", ""))),
    ]


def diagnostics(run: Run) -> list[Fact]:
    """The figures' last values, for the comparison of runs."""
    recorded = [s for s in run.snapshots if s.get("effective_rank")]
    used = utilisation(recorded[-1]["effective_rank"], recorded[-1]["ranks"]) if recorded else None
    variance = variance_points(run)
    rho = correlations(run)[0] if run.adjustments else None
    return [
        Fact("Utilisation at the end", ABSENT if used is None else f"{used:.0%}"),
        Fact("ln Var(G^(2/3) / r) at the end", signed(variance[-1][1]) if variance else ABSENT),
        Fact("Spearman ρ, rank and importance", ABSENT if rho is None else signed(rho, "+")),
    ]


def description(run: Run) -> list[tuple[str, str]]:
    """What was run: method, model, data, seed, steps, LoRA settings."""
    recipe = run.recipe
    model, data, lora = (_section(recipe, key) for key in ("model", "data", "lora"))
    steps = (run.header.get("schedule") or {}).get("total_steps") or run.final.get("step")
    rows = [
        ("Method", recipe.get("method")),
        ("Model", _words(model, "name", "quantization")),
        ("Data", _words(data, "source", "kind")),
        ("LoRA", f"rank {lora['r']}, alpha {lora.get('alpha', ABSENT)}" if "r" in lora else None),
        ("Steps", f"{steps:,}" if steps else None),
        ("Seed", recipe.get("seed", run.environment.get("seed"))),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def adjustment_rows(run: Run) -> list[dict[str, str]]:
    """One row per adjustment: which layers lost and gained triples, and what it left."""
    names = {layer.name: layer.short_name for layer in run.layers}
    return [
        {
            "step": f"{record['step']:,}" + (" (deal)" if record.get("dealt") else ""),
            "pruned": _layers(pruned_counts(record), names),
            "added": _layers(record["added"], names),
            "rank": f"{sum(record['ranks'].values()):,}",
            "parameters": _count(record.get("parameters")),
            "seconds": f"{1000 * record['seconds']:.1f} ms" if "seconds" in record else ABSENT,
            "skipped": str(record.get("skipped_steps", ABSENT)),
        }
        for record in run.adjustments
    ]


def layer_rows(run: Run) -> list[dict[str, str]]:
    """One row per layer: rank at start and end, triples lost and gained, importance, effective rank."""
    pruned = [pruned_counts(record) for record in run.adjustments]
    scores = mean_by_layer([record["layer_scores"] for record in run.adjustments])
    places = mean_by_layer([importance_ranks(record["layer_scores"]) for record in run.adjustments])
    recorded = [s["effective_rank"] for s in run.snapshots if s.get("effective_rank")]
    effective = recorded[-1] if recorded else {}
    final = run.final_ranks
    return [
        {
            "name": layer.name,
            "short_name": layer.short_name,
            "start": str(layer.rank),
            "final": str(final[layer.name]),
            "pruned": str(sum(counts.get(layer.name, 0) for counts in pruned)),
            "added": str(sum(record["added"].get(layer.name, 0) for record in run.adjustments)),
            "importance": f"{scores[layer.name]:.3g}" if layer.name in scores else ABSENT,
            "place": f"{places[layer.name]:.1f}" if layer.name in places else ABSENT,
            "effective": f"{effective[layer.name]:.2f}" if layer.name in effective else ABSENT,
        }
        for layer in run.layers
    ]


def duration(seconds: float | None) -> str:
    """12.3 s, 2 min 31 s, 3 h 05 min."""
    if seconds is None:
        return ABSENT
    if seconds < 59.95:  # what would round to 60.0 s is a minute
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def memory(size: float | None) -> str:
    """MiB below one GiB, GiB above."""
    if size is None:
        return ABSENT
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"


def _rank_fact(run: Run) -> Fact:
    if not run.layers:
        return Fact("Total rank", ABSENT, "no ranks recorded")
    start, end = sum(run.start_ranks.values()), sum(run.final_ranks.values())
    lowest, highest = min(run.final_ranks.values()), max(run.final_ranks.values())
    each = f"{lowest}" if lowest == highest else f"{lowest} to {highest}"
    value = f"{end:,}" if start == end else f"{start:,} → {end:,}"
    return Fact("Total rank", value, f"{len(run.layers)} layers of rank {each}")


def _adjustment_fact(run: Run) -> Fact:
    if not run.adjustments:
        return Fact("Adjustments", "0", "fixed rank")
    pruned = sum(len(record["pruned"]) for record in run.adjustments)
    added = sum(sum(record["added"].values()) for record in run.adjustments)
    return Fact("Adjustments", str(len(run.adjustments)), f"{pruned} triples pruned, {added} added")


def _budget(run: Run) -> str:
    budget = run.header.get("budget") or {}
    states = [s for s in run.snapshots + run.adjustments if isinstance(s.get("parameters"), int)]
    if not budget.get("parameters") or not states:
        return ""
    whole = "its budget" if budget.get("kind") == "parameters" else "its start"
    held = max(states, key=lambda state: state["step"])["parameters"]
    return f"adapter {held:,}, {held / budget['parameters']:.1%} of {whole}"


def _layers(counts: Mapping[str, int], names: Mapping[str, str]) -> str:
    parts = [f"{names[name]} ×{n}" if n > 1 else names[name] for name, n in counts.items() if n]
    return ", ".join(parts) or ABSENT


def _section(recipe: Mapping[str, Any], key: str) -> dict[str, Any]:
    section = recipe.get(key)
    return section if isinstance(section, dict) else {}


def _words(section: Mapping[str, Any], *keys: str) -> str:
    return ", ".join(str(section[key]) for key in keys if section.get(key) not in (None, "none"))


def _count(number: int | None) -> str:
    return ABSENT if number is None else f"{number:,}"


def _number(value: float) -> str:
    """Four decimals, or four significant digits from 10 on: results of a table line up."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

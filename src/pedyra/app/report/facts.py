"""What the page tells as text: what was run, and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pedyra.app.console import format_bytes, format_seconds
from pedyra.app.report.records import RunRecords

ABSENT = "–"  # what a run did not record


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


Fact = tuple[str, str]
"""One property of a run: its value as text, and a second line that puts it in proportion."""


def facts(run: RunRecords) -> dict[str, Fact]:
    """Result, size, rank, adjustments, time and memory, as far as they are known."""
    final, found = run.final, {}
    if isinstance(final.get("value"), int | float):
        name = str(final.get("metric", "result")).replace("_", " ")
        loss = final.get("eval_loss")
        found[name[:1].upper() + name[1:]] = (
            _number(final["value"]),
            "" if loss is None else f"held-out loss {_number(loss)}",
        )
    elif not final:
        found["Result"] = (ABSENT, "the run is not finished")
    if final.get("trainable_parameters") is not None:
        found["Trainable parameters"] = (f"{final['trainable_parameters']:,}", "")
    if run.layers:
        found["Total rank"] = _total_rank(run)
    if run.fit and run.fit["share"] < 1:
        share = f"parameters, {run.fit['share']:.0%} of the adapter"
        found["Smaller adapter"] = (f"{run.fit['parameters']:,}", share)
    elif run.fit:
        found["Smaller adapter"] = ("none", "everything is kept")
    if run.adjustments:
        pruned = sum(len(record["pruned"]) for record in run.adjustments)
        added = sum(sum(record["added"].values()) for record in run.adjustments)
        found["Adjustments"] = (str(len(run.adjustments)), f"{pruned} ranks pruned, {added} added")
    if final.get("seconds") is not None:
        speed = final.get("train_steps_per_second")
        found["Training time"] = (format_seconds(final["seconds"]), f"{speed:.2f} steps per second" if speed else "")
    if final.get("peak_memory_bytes") is not None:
        device = str(run.environment.get("device", ""))
        found["Peak memory"] = (format_bytes(final["peak_memory_bytes"]), device)
    return found


def _total_rank(run: RunRecords) -> Fact:
    start, ends = sum(run.start_ranks.values()), run.final_ranks.values()
    each = " to ".join(map(str, sorted({min(ends), max(ends)})))
    value = f"{start:,}" if start == sum(ends) else f"{start:,} → {sum(ends):,}"
    return (value, f"{len(run.layers)} layers of rank {each}")


def _words(section: Mapping[str, Any], *keys: str) -> str:
    return ", ".join(str(section[key]) for key in keys if section.get(key) not in (None, "none"))


def _number(value: float) -> str:
    """Four decimals, or four significant digits from 10 on: results of a table line up."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"

"""The model card of an adapter that a fit has made smaller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pedyra.lora.card import adapter_card, shown_name, shown_ranks

if TYPE_CHECKING:
    from pedyra.fitting.fit import Fit


def fit_card(
    found: Fit, base: str | None, *, title: str = "A smaller LoRA", told: Mapping[str, str] | None = None, **data: Any
) -> str:
    """What was kept of the adapter, what proves it, and on which rows.

    Args:
        base: the name of the base model.
        told: more rows of the card, shown first; one that has the name of a row of the fit takes its place.
        data: what else the metadata says; see `adapter_card`.
    """
    row, proof = found.row(), found.chosen.proof
    metrics = list(found.metrics.get("smaller") or found.metrics.get("whole", {}))
    limit = f"{found.tolerance.part:.3g} of the {found.tolerance.won.mean:.4f} that fine-tuning won"
    judged = ""
    if proof is not None:
        low, high = proof.interval()
        judged = (
            f"the {found.measure} rises by {proof.mean:+.4f} [{low:+.4f}, {high:+.4f}] (95 %), on {proof.batches} "
            f"batches of its own; the tolerance is {found.tolerance.loss:.4f}, {limit}"
        )
        if found.asked and not found.chosen.accepted:
            judged += "; not proved to be within the tolerance: the size was asked for"
    recovery = f", then {found.recover_steps} steps of recovery" if found.chosen.gains_by_recovery else ""
    rows = {
        "base model": shown_name(base),
        **(told or {}),
        "fit": "nothing smaller was within the tolerance, so everything is kept"
        if found.is_whole
        else f"cut to {row['kept']} of {row['of']} directions{recovery}",
        "adapted": shown_ranks([rank for rank in found.ranks.values() if rank]),
        "parameters": f"{row['parameters']:,} in the LoRA factors, {row['share']:.1%} of the adapter it was cut from",
        "proof": judged,
        "verdict": found.words,
        "rows of the fit": found.rows,
        "metrics": _metrics(found, metrics),
    }
    return adapter_card(title, rows, base=base, metrics=metrics, **data)


def _metrics(found: Fit, names: list[str]) -> str:
    """Each metric on the rows of the proof: of the base model, of the adapter, and of the smaller one."""
    parts = []
    for name in names:
        values = {which: each[name] for which, each in found.metrics.items() if name in each}
        parts.append(f"{name} " + ", ".join(f"{value:.4f} ({which})" for which, value in values.items()))
    return "; ".join(parts)

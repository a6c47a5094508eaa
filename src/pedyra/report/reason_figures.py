"""Why ranks moved at an adjustment, or did not: what a new triple would gain against what would go for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pedyra.report.chart import Chart, Figure, Series
from pedyra.report.curves import STEP, figure, phases
from pedyra.report.run_folder import Record, Run


@dataclass(frozen=True)
class Reason:
    """One adjustment's surest candidate against the triples on trial that would have paid for it.

    All are losses saved, to second order, by the curvature that trials measured (`pedyra.methods.pedyra.swaps`).
    """

    step: int
    layer: str
    gain: float
    low: float
    """What is surely saved: less what the standard errors that the run's certainty asks for explain, and nothing where
    the gain is not beyond chance."""
    high: float
    bar: float | None
    """What `low` had to exceed, at least what is worth a move; None where too little was on trial to pay for it."""
    payers: Sequence[tuple[str, int]]
    """(layer, triple) of what would have gone, worth least first; empty where the spare parameters were enough."""
    moved: bool
    tried: bool
    """Whether anything was on trial."""

    @property
    def is_noise(self) -> bool:
        return self.low == 0


def reasons(runs: Sequence[Run]) -> Figure | None:
    """Per adjustment the surest candidate with its error, and the bar it had to clear, one panel per run."""
    panels, findings = [], []
    for run in runs:
        found = reasons_of(run)
        if not found:
            continue
        prefix = f"{run.label}: " if len(runs) > 1 else ""
        title = f"{prefix}gain of the surest new triple" if prefix else "Gain of the surest new triple"
        panels.append(Chart(title, STEP, "loss saved", _series(run, found), phases=phases([run])))
        findings.append(prefix + _finding(found) + _deals(run))
    caption = (
        "At each adjustment the new direction that most surely saves loss, per parameter, to second order, with the "
        "standard errors that the run's certainty asks for, and the bar: what the triples on trial that would have to "
        "go for it save, times the margin, or a thousandth of what an average triple saves. Ranks move where all of "
        "the error line is above the bar; a line that reaches 0 is a gain that chance may show among so many "
        "directions. Triples go on trial after one beyond it. "
        f"{' '.join(findings)}"
    )
    return figure("reasons", "Rank allocation", "Why ranks moved, or did not", caption, panels)


def reasons_of(run: Run) -> list[Reason]:
    """One reason per adjustment that measured gains and trials, but a deal; none in a run that prunes by scores."""
    config = run.header.get("config") or {}
    certainty, margin = config.get("certainty"), config.get("margin")
    if certainty is None or margin is None:
        return []
    costs = _costs(run)
    found, ranks = [], run.start_ranks
    for record in run.adjustments:
        if record.get("gains") and record.get("curvature") and not record.get("dealt"):
            found.append(_reason(run, record, ranks, costs, certainty, margin ** (1 - _progress(run, record["step"]))))
        ranks = record["ranks"]
    return found


def _reason(
    run: Run, record: Record, ranks: Mapping[str, int], costs: Mapping[str, int], certainty: float, margin: float
) -> Reason:
    def saves(layer: str, sign: int) -> float:
        """To second order; less, or more, than what noise explains."""
        mean, error, reach = record["gains"][layer]
        slope = mean * abs(mean) + sign * (certainty * error) ** 2
        bent = 2 * record["curvature"][layer] * reach
        return slope / bent if bent else 0.0  # no step measured the layer: its inputs overflowed in all

    def surely(layer: str) -> float:
        mean, error, _ = record["gains"][layer]
        return max(0.0, saves(layer, -1)) if mean > chance * error else 0.0

    chance = record.get("chance", 0.0)
    chance = math.inf if chance is None else chance
    layer = max(record["gains"], key=lambda name: (surely(name) / costs[name], saves(name, -1) / costs[name]))
    # At most one error above its mean is what a triple on trial may be worth.
    worth = [(n, i, (max(0.0, mean) + error) * length / 2) for n, i, mean, error, _, length in record["trials"]]
    worth.sort(key=lambda triple: triple[2] / costs[triple[0]])
    free, payers, lost = _spare(run, ranks, costs) - costs[layer], [], 0.0
    for name, i, value in worth:
        if free >= 0:
            break
        free, lost = free + costs[name], lost + value
        payers.append((name, i))
    return Reason(
        step=record["step"],
        layer=layer,
        gain=max(0.0, saves(layer, 0)),
        low=surely(layer),
        high=max(0.0, saves(layer, 1)),
        bar=max(margin**2 * lost, record.get("least_gain", 0.0) * costs[layer]) if free >= 0 else None,
        payers=payers if free >= 0 else [],
        moved=bool(record["added"]),
        tried=bool(record["trials"]),
    )


def _costs(run: Run) -> dict[str, int]:
    """Parameters of a rank by layer; 1 where the budget counts ranks."""
    counted = (run.header.get("budget") or {}).get("kind") == "parameters"
    trained = int(bool((run.header.get("config") or {}).get("train_e")))
    rows = run.header.get("layers") or []
    sizes = {row["name"]: row.get("in_features", 0) + row.get("out_features", 0) for row in rows}
    return {name: size + trained if counted and size else 1 for name, size in sizes.items()}


def _spare(run: Run, ranks: Mapping[str, int], costs: Mapping[str, int]) -> int:
    return sum((run.start_ranks[name] - ranks[name]) * cost for name, cost in costs.items())


def _progress(run: Run, step: int) -> float:
    """0 at the first adjustment, approaching 1 at the end of the window."""
    schedule = run.header.get("schedule") or {}
    first = (schedule.get("adjustments") or [step])[0]
    end = schedule.get("total_steps", step) - schedule.get("final_warmup", 0)
    return min(1.0, (step - first) / max(1, end - first))


def _series(run: Run, found: Sequence[Reason]) -> list[Series]:
    short = {layer.name: layer.short_name for layer in run.layers}
    series = []
    for name, slot, kept in (
        ("gain, ranks moved", 2, [reason for reason in found if reason.moved]),
        ("gain, ranks stayed", 0, [reason for reason in found if not reason.moved]),
    ):
        if kept:
            low, high = [r.low for r in kept], [r.high for r in kept]
            labels = [f"new in {short[r.layer]}, surely {r.low:.2g}" for r in kept]
            gains = [r.gain for r in kept]
            series.append(Series(name, [r.step for r in kept], gains, "points", slot, low, high, labels=labels))
    barred = [reason for reason in found if reason.bar is not None and reason.payers]
    if barred:
        told = [", ".join(f"{short[layer]} (triple {i})" for layer, i in reason.payers) for reason in barred]
        labels = [f"bar, for {text}" for text in told]
        bars = [reason.bar for reason in barred]
        series.append(Series("bar", [r.step for r in barred], bars, "points", 1, labels=labels))
    return series


def _deals(run: Run) -> str:
    steps = [f"{record['step']:,}" for record in run.adjustments if record.get("dealt")]
    return f" At step {', '.join(steps)} all ranks were dealt anew, by what the triples saved." if steps else ""


def _finding(found: Sequence[Reason]) -> str:
    stayed = [reason for reason in found if not reason.moved]
    noise = sum(reason.is_noise for reason in stayed)
    unpaid = [reason.tried for reason in stayed if reason.bar is None and not reason.is_noise]
    text = f"ranks moved at {len(found) - len(stayed)} of {len(found)} adjustments"
    parts = [
        f"at {count} {why}"
        for count, why in (
            (noise, "the gain was not clear of noise"),
            (unpaid.count(False), "nothing was on trial"),
            (unpaid.count(True), "too little was on trial to pay for it"),
            (len(stayed) - noise - len(unpaid), "it did not clear the bar"),
        )
        if count
    ]
    text += f"; {', '.join(parts)}" if parts else ""
    return text[:1].upper() + text[1:] + "."

"""A fit as text: its curve, its verdict and its proof."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pedyra.fitting.verdict import Increase

if TYPE_CHECKING:
    from pedyra.fitting.fit import Fit


def told(fit: Fit) -> str:
    """The table of the sizes that were measured, and what follows from them."""
    tried = any(each.recovered for each in fit.curve)
    head = ["", "parameters", "share", "directions", "predicted", "choice", *(["recovered"] if tried else []), "proof"]
    cells = [
        [
            "->" if each.ranks == fit.ranks else "",
            f"{each.parameters:,}",
            f"{each.share:.1%}",
            str(sum(each.ranks.values())),
            f"{each.predicted:+.4f}",
            _increase(each.measured),
            *([_increase(each.recovered)] if tried else []),
            _increase(each.proof) + {None: "", True: "  accepted", False: "  rejected"}[each.accepted],
        ]
        for each in fit.curve
    ]
    row, limit, proof = fit.row(), fit.tolerance, fit.chosen.proof
    lines = [f"rise of the {fit.measure}, by number of parameters", *_table(head, cells), fit.words]
    if fit.rows:
        lines.append(f"rows        {fit.rows}")
    won = f"{limit.won.mean:.4f} ± {limit.won.error:.4f}"
    lines.append(f"won         {won} of the {fit.measure}; {limit.part:.1%} of it is {limit.loss:.4f}")
    if fit.is_whole:
        return "\n".join([*lines, "kept        everything"])
    if (cut := fit.chosen.measured) and (after := fit.chosen.recovered):
        kept = "" if fit.chosen.gains_by_recovery else "; no gain, so the cut stays as it was"
        change = f"rise of {cut.mean:+.4f} -> {after.mean:+.4f} in {fit.recover_steps} steps"
        lines.append(f"recovered   {change}, on the rows of the choice{kept}")
    size = f"{row['parameters']:,} parameters ({row['share']:.1%})"
    lines.append(f"kept        {row['kept']} of {row['of']} directions, {size}")
    if proof is not None:
        low, high = proof.interval()
        told = f"{proof.mean:+.4f} [{low:+.4f}, {high:+.4f}] (95 %)"
        lines.append(f"proof       the {fit.measure} rises by {told}, on {proof.batches} batches of its own")
        if fit.asked and not fit.chosen.accepted:
            lines.append("            not proved to be within the tolerance: the size was asked for")
    for name in fit.metrics.get("smaller", {}):
        values = {which: each[name] for which, each in fit.metrics.items() if name in each}
        both = f"{values['whole']:.4f} -> {values['smaller']:.4f}" if "whole" in values else f"{values['smaller']:.4f}"
        base = f" (base model {values['base']:.4f})" if "base" in values else ""
        lines.append(f"metric      {name} {both}{base}, on the rows of the proof")
    return "\n".join(lines)


def _increase(found: Increase | None) -> str:
    return "" if found is None else f"{found.mean:+.4f} ± {found.error:.4f}"


def _table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they need to be, flush right but for the last."""
    rows = [head, *cells]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    last = len(head) - 1
    lines = []
    for row in rows:
        padded = [
            each.ljust(width) if column == last else each.rjust(width)
            for column, (each, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines

"""What an adjustment leaves in the history and in `ranks.jsonl`: plain values, for JSON."""

from __future__ import annotations

from typing import Any

from pedyra.allocate.contract import Decision, Situation


def adjustment_record(now: Situation, decision: Decision, **outcome: Any) -> dict[str, Any]:
    """The record of an adjustment that found `now`, and of what was decided.

    Of every method:

    - `step`, `ranks` (layer -> rank afterwards), `total_rank`, `parameters` (afterwards), `seconds`, `skipped_steps`
    - `scores`: layer -> one a triple, those that the plan was made from
    - `layer_scores`: layer -> mean of its scores
    - `pruned`: layer, triple, score; `added`: layer -> count; `masked` (layer, triple) of a method that masks

    Of method pedyra, `fit`:

    - `state` (asking, cut, nothing may go, nothing is learned yet, no time is left), `share` of the parameters left
    - `verdict` and `words`; `won` and its standard error; `tolerance` in units of the loss; `spent`, `looks`, `batches`
    - `learning`: layers that lose nothing now; `points`: every answer, see `methods.pedyra.asking`

    Its scores are what removing each balanced direction alone costs.

    Args:
        outcome: what only `RankAllocator` knows: `parameters`, `seconds`, `skipped_steps`.
    """
    plan, scores = decision.plan, decision.scores
    return {
        "kind": "adjustment",
        "step": now.step,
        "ranks": plan.ranks,
        "layer_scores": plan.layer_scores,
        "scores": scores,
        "pruned": [[name, i, scores[name][i]] for name, indices in plan.pruned.items() for i in indices],
        "added": plan.added,
        "total_rank": sum(plan.ranks.values()),
        **({"masked": [[name, i] for name, indices in plan.masked.items() for i in indices]} if plan.masked else {}),
        **outcome,
        **decision.reasons,
    }

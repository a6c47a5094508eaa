"""What an adjustment leaves in the history and in `ranks.jsonl`: plain values, for JSON."""

from __future__ import annotations

from typing import Any

from pedyra.allocate.contract import Decision, Situation


def adjustment_record(now: Situation, decision: Decision, **outcome: Any) -> dict[str, Any]:
    """The record of an adjustment that found `now`, and of what was decided.

    Of every method:

    - `step`, `ranks` (layer -> rank afterwards), `total_rank`, `parameters` (afterwards), `seconds`, `skipped_steps`
    - `scores`: layer -> one a triple, those that the plan was made from. Of our default method predicted losses
      (h c^2 / 2, see `pedyra.methods.pedyra.swaps`), in a layer with directions on trial those of its directions;
      at the reassignment the losses of `pedyra.methods.pedyra.reassignment`
    - `layer_scores`: layer -> mean of its scores
    - `pruned`: layer, triple, score; `added`: layer -> count; `masked` (layer, triple) of a method that masks
    - `reassigned`: whether all ranks were assigned anew

    Of our default method, where something may move:

    - `gains`: layer -> mean, error and energy of its surest candidate
    - `chance`: in errors, what the largest gain reaches by chance (by fewer patterns where nothing is beyond it), None
      where it is infinite; `sure`: how many candidates are beyond it
    - `trials`: layer, triple, mean, error, energy, length of what was on trial; the triples are those of a turned layer
    - `curvature`: layer -> that per energy; `least_gain`: what a candidate must save per unit of cost to matter
    - `contests`: what became of candidates, each with `layer`, `candidate`, `gain`, `cost`, `against` (layer, triple,
      worth of what would pay), `bar` (what the gain must exceed) and `outcome`, see `swaps.Contest`: of every layer's
      surest one, and of all that are more than noise; empty at the reassignment

    Of a fit in the run, `fit`:

    - `state` (asking, cut, nothing may go, nothing is learned yet, no time is left), `share` of the parameters left
    - `verdict` and `words`; `won` and its standard error; `tolerance` in units of the loss; `spent`, `looks`, `batches`
    - `learning`: layers that lose nothing now; `points`: every answer, see `methods.fit.asking`

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
        "reassigned": False,
        **outcome,
        **decision.reasons,
    }

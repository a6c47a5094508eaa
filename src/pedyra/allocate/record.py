"""What an adjustment leaves in the history and in `ranks.jsonl`: plain values, for JSON."""

from __future__ import annotations

import math
from typing import Any

from pedyra.allocate.allocation import RankPlan, Scores
from pedyra.allocate.rule import Situation
from pedyra.methods.pedyra.swaps import least_gain


def adjustment_record(now: Situation, scores: Scores, plan: RankPlan, **outcome: Any) -> dict[str, Any]:
    """The record of an adjustment that found `now`, and of what it did.

    `step`, `ranks` and `layer_scores` (layer -> each), `scores` (layer -> one a triple, before it; at the deal the
    losses of `core.allocation.deal_ranks`), `pruned` (layer, triple, score), `added` (layer -> count), `total_rank`,
    `masked` (layer, triple) of a method that masks,
    and of a sketch:

    - `gains`: layer -> mean, error and reach of its surest candidate
    - `chance`: in errors, by fewer patterns where nothing is beyond it, None where it is infinite
    - `sure`: how many candidates are beyond it
    - `trials`: layer, triple, mean, error, reach, length; the triples are those of a turned layer
    - `curvature`: layer -> that per reach; `least_gain`: see `core.swaps`

    Args:
        scores: those the plan was made by, the rows being as they are when it is carried out.
        outcome: what only `RankAllocator` knows: `dealt` (whether all ranks were dealt anew), `parameters`, `seconds`,
            `skipped_steps`.
    """
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
        **_measured(now),
    }


def _measured(now: Situation) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if now.candidates is not None:
        surest = {name: gains[0] for name, gains in now.candidates.items() if gains}
        result["gains"] = {name: [gain.mean, gain.error, gain.reach] for name, gain in surest.items()}
        result["chance"] = now.chance if math.isfinite(now.chance) else None
        every = (gain for gains in now.candidates.values() for gain in gains)
        result["sure"] = sum(gain.beyond(now.chance) for gain in every)
    if now.trials is not None:
        tried = ((name, i, gain) for name, gains in now.trials.items() for i, gain in gains.items())
        result["trials"] = [[name, i, gain.mean, gain.error, gain.reach, gain.length] for name, i, gain in tried]
        result["curvature"] = {name: curvature.by_reach for name, curvature in now.curvature.items()}
        result["least_gain"] = least_gain(now.losses, now.prices)
    return result

"""Mask (Fig. 8): PE-DyRA's scores; the lowest triples are masked to zero, not removed, so that they can come back."""

from __future__ import annotations

from dataclasses import replace

from pedyra.allocate.allocation import RankPlan, Scores, layer_means, lowest, make_plan, prunable
from pedyra.methods.adapter import adaptive, with_lora
from pedyra.methods.method import Adaptation, Method, Request
from pedyra.methods.settings import ablation_settings
from pedyra.pe_dyra.scored import ScoredMethod, ScoredSituation, unchecked


def mask_lowest(scores: Scores, now: ScoredSituation) -> RankPlan:
    """At the n-th adjustment the n k triples with the lowest scores are masked; a layer's best `min_rank` never."""
    count = now.moves * sum(at <= now.step for at in now.schedule.adjustments)
    return replace(make_plan(scores, {}, {}, layer_means(scores)), masked=lowest(prunable(scores, now.min_rank), count))


def prepare(request: Request) -> Adaptation:
    """PE-DyRA with the "temporary zero-masking strategy" of Appendix F, which says no more of it.

    Masking sets E of a triple to 0; it goes on being trained, and counts as come back when a later adjustment no longer
    masks it. Nothing grows, because nothing is free. `rank.omega` "uniform" is the linear combination of Fig. 8a.

    Raises:
        ValueError: E is not trained, so that a masked triple could never come back.
    """
    config = ablation_settings(request, "moves")
    if config.start != "svd":
        raise ValueError(
            f"rank.start is {config.start!r}, but method mask sets E to 0 and lets it learn; use rank.start='svd'"
        )
    return adaptive(with_lora(request), ScoredMethod(settings=config, policy=mask_lowest, check_start=unchecked))


METHOD = Method("mask", "PE-DyRA's scores, lowest ranks masked to zero (Fig. 8)", prepare, moves_ranks=True)

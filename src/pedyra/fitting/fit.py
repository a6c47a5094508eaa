"""Fit: the smallest adapter that does the job, cut out of one that is trained, with a proof on rows of its own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from pedyra.errors import UserError
from pedyra.fitting.calibration import calibrate, disabled, evaluating, has_more, lora_layers, seconds_a_batch
from pedyra.fitting.curve import Ladder, point, whole
from pedyra.fitting.cut import cut_to
from pedyra.fitting.general import Forgetting, HarmLadder, harm_first, slopes_at_half
from pedyra.fitting.gramians import Calibration
from pedyra.fitting.judge import Batch, Judge
from pedyra.fitting.result import Fit
from pedyra.fitting.search import RECOVERIES, Search
from pedyra.fitting.sizes import Held, Sizes
from pedyra.fitting.verdict import CONFIDENCE, Candidate, Factors, Tolerance, paired, verdict
from pedyra.fitting.wanted import Wanted

logger = logging.getLogger(__name__)

LEAST, FEW = 4, 8
"""Batches of the proof: fewer than `LEAST` give no interval worth the name, and fewer than `FEW` a wide one."""
RECOVERY, PASSES = 160, 2
"""Steps of recovery by default: at most so many steps, and at most so many passes over the calibration batches.
Seventeen adapters were measured with them, and on a language two passes over 16 batches were enough. More steps are no
better: on two adapters of SST-2, cut to a quarter, 128, 160 and 256 steps end 0.0064, -0.0007, 0.0016 and -0.0006,
-0.0039, 0.0011 above the whole one."""
EVALUATIONS, EVALUATIONS_WITH_RECOVERY = 8, 12
"""Of all held-out rows, at most, unless the whole curve is asked for."""


class NotWithin(ValueError):
    """No size of the shape that was asked for is within the tolerance; the message says the nearest that can be had."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The batches of a fit, on this process."""

    calibration: Sequence[Batch]
    """For gradients, of rows like those the adapter was trained on."""
    choice: Sequence[Batch]
    """Of rows it was not trained on."""
    proof: Sequence[Batch]
    """Other such batches."""
    told: str = ""
    """Which rows they are, in words."""
    general: GeneralRows | None = None


@dataclass(frozen=True, kw_only=True)
class GeneralRows:
    """Batches of text that the adapter should not make the model forget, on this process."""

    judge: Judge
    slopes: Sequence[Batch]
    """For gradients."""
    proof: Sequence[Batch]
    """Of other rows."""
    told: str = ""
    """How many texts they are, in words."""


def fit_batches(
    judge: Judge,
    rows: Rows,
    wanted: Wanted,
    *,
    ranks: Sequence[int] = (),
    adapter: str = "default",
    shown: bool = False,
) -> Fit:
    """How small the LoRA of the judge's model may be. The model stays as it is. `pedyra.fit` is this with a Trainer.

    The processes of accelerate hold other batches of the same rows, and all of them find the same. A held-out batch in
    which nothing has a label (prompts that were cut before their completion) has no loss and is left out, in every
    process.

    Args:
        ranks: those that the place takes where the adapter will be served, from the largest down. Each is asked as the
            largest rank of a layer, until one is not within tolerance, and the fit is at the one before.
        shown: a progress bar, and an estimate before it begins.

    Raises:
        NotWithin: not even the largest of these ranks, or the shape that is wanted, is within tolerance.
        ValueError: too few batches, a layer that was not seen, a shape that cannot be had within tolerance.
    """
    choice, proof = (labelled(judge, part) for part in (rows.choice, rows.proof))
    rows = replace(rows, choice=choice, proof=proof)
    batches, every = sum(gather_object([len(proof)])), gather_object([len(choice)])
    if batches < LEAST or sum(every) < 2 or not all(every) or len(rows.calibration) < 2:
        each = "" if len(every) == 1 else f", and a process has {min(every)} of the choice and takes 1"
        raise UserError(
            f"calibration, choice and proof have {len(rows.calibration)}, {sum(every)} and {batches} batches; "
            f"they take 2, 2 and {LEAST}, and 30 make them good{each}: give more rows"
        )
    if batches < FEW:
        warnings.warn(f"the proof has {batches} batches, so its interval is wide; give more rows", stacklevel=3)
    fitting = _Fitting(judge, rows, wanted, adapter, ranks)
    try:
        return fitting.run(shown)
    finally:
        fitting.bar.total = fitting.bar.n
        fitting.bar.set_description("fit")
        fitting.bar.close()


def labelled(judge: Judge, batches: Sequence[Batch]) -> list[Batch]:
    """The batches that have labels here and in every other process. A Trainer's loss may gather over the processes, so
    all of them have to be at the same place."""
    every = gather_object([[judge.samples(batch) > 0 for batch in batches]])
    return [batch for place, batch in enumerate(batches) if all(has[place] for has in every if place < len(has))]


class _Fitting:
    """One fit."""

    def __init__(self, judge: Judge, rows: Rows, wanted: Wanted, adapter: str, ranks: Sequence[int]) -> None:
        self.judge, self.model, self.rows, self.wanted, self.adapter = judge, judge.model, rows, wanted, adapter
        self.ranks = ranks
        self.bar = tqdm(disable=True)
        self.steps = self._steps()
        self.shape = wanted.shape([*lora_layers(self.model, adapter)], has_more(self.model, adapter))

    def _steps(self) -> int:
        """Of recovery; none by default where the model gives nothing that can be compared."""
        steps, batches = self.wanted.recover, self.rows.calibration
        if steps and self.rows.general:
            raise UserError("recovery learns what the whole adapter says, and what it forgets too; leave recover out")
        if steps == 0 or self.rows.general:
            return 0
        why = "it gives no logits"
        try:
            with evaluating(self.model), torch.no_grad():
                gives = bool(self.judge.outputs(batches[0]))
        # Of a model whose loss its Trainer computes in a way of its own, or never whole: all logits may have no room.
        except Exception as error:
            gives, why = False, f"its forward pass raises {type(error).__name__}: {error}"
        gives = all(gather_object([gives]))
        if not gives and steps is not None:
            raise UserError(f"recovery compares what the model says, and {why}; leave recover out")
        if not gives:
            logger.warning("fit: no recovery, which compares what the model says, because %s", why)
            return 0
        return min(RECOVERY, PASSES * len(batches)) if steps is None else steps

    def run(self, shown: bool) -> Fit:
        rows, wanted = self.rows, self.wanted
        self._estimate(shown)
        calibration, ladder = self._calibrated()
        asked = None if wanted.parameters is None else ladder.within(wanted.parameters)
        batches = (rows.calibration, rows.choice, rows.proof)
        sizes = Sizes(self.judge, calibration, batches, adapter=self.adapter, steps=self.steps, bar=self.bar)
        limit = Tolerance(sizes.won, wanted.part)
        ladder, tried = self._at_least_rank(ladder, limit, sizes)
        search = Search(ladder, limit, sizes)
        if wanted.curve and not limit.learned:  # else it is measured on the way
            search.measure_curve()
        if asked is not None:
            chosen = self._taken(search, asked)
        else:
            chosen = search.choose(wanted.curve) if limit.learned else None
            if chosen is None and tried and tried[-1].accepted:
                chosen = tried[-1]
            if chosen is None and not ladder.is_whole(0):
                raise NotWithin(self._refusal(search, sizes))
        everything = point(calibration, whole(calibration))
        taken = chosen or everything
        forgetting = self._forgetting(sizes.factors(taken))
        known = {each.parameters: each for each in (everything, *tried, *search.curve)}
        curve = sorted(known.values(), key=lambda each: -each.parameters)
        kind, words = self._verdict(taken, curve, limit, forgetting)
        metrics = {"base": sizes.metrics["base"], "whole": sizes.metrics["whole"], "smaller": taken.metrics}
        return Fit(
            calibration=calibration,
            curve=curve,
            chosen=taken,
            tolerance=limit,
            asked=asked is not None,
            recover_steps=self.steps if any(each.recovered for each in curve) else 0,
            factors={name: (A.clone(), B.clone()) for name, (A, B) in sizes.factors(taken).items()},
            verdict=kind,
            words=words,
            measure=self.judge.measure,
            forgetting=forgetting,
            rows=rows.told,
            metrics={name: each for name, each in metrics.items() if each},
            model=self.model,
            adapter=self.adapter,
        )

    def _calibrated(self) -> tuple[Calibration, Ladder]:
        """What the directions are worth, and the sizes that follow: by what they are worth to the task or, where
        general text is not to be forgotten, by how much they harm it for that."""
        self.bar.set_description("calibration")
        found = calibrate(self.judge, self._counted(self.rows.calibration), adapter=self.adapter)
        if (general := self.rows.general) is None:
            return found, Ladder(found, self.shape)
        self.bar.set_description("what harms general text")
        task, harm = (
            slopes_at_half(judge, self._counted(batches), found, adapter=self.adapter)
            for judge, batches in ((self.judge, self.rows.calibration), (general.judge, general.slopes))
        )
        ordered, harm = harm_first(replace(found, repairs=False), task, harm)
        return ordered, HarmLadder(ordered, self.shape, harm)

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            yield item
            self.bar.update()

    def _estimate(self, shown: bool) -> None:
        """Tell how long it takes at most, by one batch of each kind."""
        trained, choice = self.rows.calibration[0], self.rows.choice[0]
        calibrated, evaluated = seconds_a_batch(self.judge, trained, choice, self.adapter)
        calibration, held = len(self.rows.calibration), len(self.rows.choice) + len(self.rows.proof)
        recovery = RECOVERIES * self.steps * (calibrated + evaluated)
        evaluations = EVALUATIONS_WITH_RECOVERY if self.steps else EVALUATIONS
        seconds = calibration * calibrated + evaluations * held * evaluated + recovery
        if general := self.rows.general:
            seconds += (calibration + len(general.slopes)) * calibrated + 3 * len(general.proof) * evaluated
        time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        text = (
            f"fit: {calibration} batches of calibration and at most {evaluations} evaluations of {held} held-out "
            f"batches, about {time} at most"
        )
        logger.info(text)
        if shown:
            print(text)
            self.bar = tqdm(total=calibration + evaluations * held, unit="batch")

    def _at_least_rank(self, ladder: Ladder, limit: Tolerance, sizes: Sizes) -> tuple[Ladder, list[Candidate]]:
        """The sizes at the least of the ranks whose largest size is proved to be within tolerance, and what was
        proved on the way.

        The order is fixed before any rank is measured, so each may be held to the whole doubt (see
        `pedyra.fitting.search`). From the least rank up, every further one would be one more chance to be accepted by
        luck. Two things can go wrong, each in 5 % of cases at most: a rank is accepted that no size is within, and at
        the rank that is taken a size is taken that is not.
        """
        tried: list[Candidate] = []
        for rank in self.ranks:
            smaller = Ladder(ladder.calibration, replace(self.shape, max_rank=rank))
            if smaller.is_whole(0):
                continue
            search = Search(smaller, limit, sizes)
            if not search.promises(search.measured(0), 1 - CONFIDENCE):
                search.recovered(0)
            tried.append(search.proved(0))
            if not tried[-1].accepted:
                if len(tried) == 1 and rank == self.ranks[0]:
                    raise NotWithin(self._refusal(search, sizes))
                break
            ladder, self.shape = smaller, smaller.shape
        return ladder, tried

    def _taken(self, search: Search, index: int) -> Candidate | None:
        """The size that was asked for, measured and proved; None where it is the whole adapter."""
        if search.ladder.is_whole(index):
            return None
        if self.wanted.curve:
            search.measure_curve()
        search.measured(index)
        search.recovered(index)
        return search.proved(index)

    def _verdict(
        self, taken: Candidate, curve: Sequence[Candidate], limit: Tolerance, forgetting: Forgetting | None
    ) -> tuple[str, str]:
        """What the fit says of the adapter, in a word and as a sentence."""
        most = max(curve, key=lambda each: each.parameters)
        ranks = {*most.ranks.values()}
        rank = ranks.pop() if len(ranks) == 1 and most.share == 1 else None
        if self.wanted.parameters is not None and taken.share == 1:
            kind, _ = verdict(taken, curve, limit, rank, self.judge.measure, free=self.shape.is_free)
            return kind, (
                f"unknown: the adapter has {taken.parameters:,} parameters, no more than the "
                f"{self.wanted.parameters:,} that were asked for, so nothing is cut"
            )
        if forgetting is not None and limit.learned:
            return forgetting.verdict(cut=taken.share < 1)
        return verdict(taken, curve, limit, rank, self.judge.measure, free=self.shape.is_free)

    def _forgetting(self, factors: Factors) -> Forgetting | None:
        """What an adapter of these factors does to general text, where there is some."""
        if (general := self.rows.general) is None:
            return None
        self.bar.set_description("general text")
        held = Held(general.judge, general.proof, self._counted)
        base = held.losses(partial(disabled, self.model))
        smaller = held.losses(partial(cut_to, self.model, factors, self.adapter))
        return Forgetting(
            whole=paired(base, held.whole, held.weights),
            smaller=paired(base, smaller, held.weights),
            undone=paired(held.whole, smaller, held.weights),
        )

    def _refusal(self, search: Search, sizes: Sizes) -> str:
        """Why no size of the wanted shape is taken: what the largest does to the loss, and the nearest that can be."""
        wanted, limit, ladder, top = self.wanted, search.limit, search.ladder, search.point(0)
        named = {"max_rank": wanted.max_rank, "drop_types": ",".join(wanted.drop_types)}
        shape = " and ".join(f"{name} {value}" for name, value in named.items() if value)
        what = f"with {shape} at most {top.parameters:,} of {ladder.everything:,} parameters are left"
        if not limit.learned:
            return (
                f"{what}, but the adapter has not lowered the {self.judge.measure} beyond its noise, so no size can be "
                f"held to a tolerance; give parameters {top.parameters} to take it whatever it does"
            )
        rise = top.proof or search.measured(0).best
        assert rise is not None
        repairs, rank = ["a larger tolerance", "more rows"], wanted.max_rank
        highest = max(layer.rank for layer in ladder.calibration.layers.values())
        while rank is not None and 2 * rank < highest:
            rank *= 2
            nearest = Ladder(ladder.calibration, replace(self.shape, max_rank=rank)).point(0)
            if limit.allows(sizes.on_choice(nearest), *sizes.ahead):
                repairs.insert(0, f"max_rank {rank} (it seems to be within)")
                break
        return (
            f"{what}, and the {self.judge.measure} rises by {rise.mean:.3g} ± {rise.error:.2g}, which is not within "
            f"the tolerance of {limit.loss:.3g}; give {', '.join(repairs)}, or parameters {top.parameters} to take it "
            f"whatever it does"
        )

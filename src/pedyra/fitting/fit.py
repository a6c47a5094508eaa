"""Fit: the smallest adapter that does the job, cut out of one that is trained, with a proof on rows of its own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from pedyra.fitting.calibration import (
    calibrate,
    disabled,
    evaluating,
    has_more,
    lora_layers,
    seconds_a_batch,
    truncated,
)
from pedyra.fitting.curve import Ladder, Shape, by_type, point, whole
from pedyra.fitting.cut import Factors, cut_factors
from pedyra.fitting.general import Forgetting, HarmLadder, Slopes, harm_first, slopes_at_half
from pedyra.fitting.judge import Batch, Cut, Judge, Predictions
from pedyra.fitting.recover import distill, recovered
from pedyra.fitting.result import Fit, Metrics
from pedyra.fitting.search import RECOVERIES, Search
from pedyra.fitting.verdict import Increase, Point, Ranks, Tolerance, paired, verdict

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
class Wanted(Shape):
    """What is asked of a fit."""

    tolerance: float = 0.01
    """Part of what fine-tuning won (loss of the base model less the adapter's) that may be given up, in (0, 1)."""
    parameters: int | None = None
    """Take the largest size of at most so many parameters instead, whatever it does to the loss."""
    drop_types: str | Sequence[str] = ()
    """Module types that keep none, e.g. q_proj."""
    recover: int | None = None
    """Steps, of one calibration batch each, that train a cut adapter to say what the whole one says, where the cut
    alone leaves more than a quarter, or a size is asked for; 0: none. None: 160, and each batch twice at most."""
    rows: int = 1024
    """To calibrate with, and for the proof, at most; half as many for the choice."""
    curve: bool = False
    """Measure the whole curve, not only what the choice needs."""

    def __post_init__(self) -> None:
        if isinstance(self.drop_types, str):
            object.__setattr__(self, "drop_types", (self.drop_types,))
        if not isinstance(self.tolerance, (int, float)) or not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance!r}; it is a part of what was won, in (0, 1), e.g. 0.01")
        if self.recover is not None and self.recover < 0:
            raise ValueError(f"recover is {self.recover}; it is a number of steps, 0 or more")
        if self.parameters is not None and self.parameters < 1:
            raise ValueError(f"parameters is {self.parameters}; an adapter has at least one")
        if self.rows < 16:
            raise ValueError(f"rows is {self.rows}; a fit takes at least 16")
        super().__post_init__()

    def shape(self, names: Sequence[str], more: bool) -> Shape:
        """What the ranks of an adapter have to look like.

        Args:
            names: its layers.
            more: whether layers have more than their directions: a magnitude (DoRA), or a bias.
        """
        if more and self.drop_types:
            raise ValueError("drop_types empties layers, but each layer of this adapter has a magnitude or a bias too")
        return replace(self, drop=by_type(self.drop_types, names) if self.drop_types else None, least=int(more))


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
    adapter: str = "default",
    shown: bool = False,
) -> Fit:
    """How small the LoRA of the judge's model may be. The model stays as it is. `pedyra.fit` is this with a Trainer.

    The processes of accelerate hold other batches of the same rows, and all of them find the same. A held-out batch in
    which nothing has a label (prompts that were cut before their completion) has no loss and is left out, in every
    process.

    Args:
        shown: a progress bar, and an estimate before it begins.

    Raises:
        ValueError: too few batches, a layer that was not seen, a shape that cannot be had within tolerance.
    """
    choice, proof = (labelled(judge, part) for part in (rows.choice, rows.proof))
    rows = replace(rows, choice=choice, proof=proof)
    batches, every = sum(gather_object([len(proof)])), gather_object([len(choice)])
    if batches < LEAST or sum(every) < 2 or not all(every) or len(rows.calibration) < 2:
        each = "" if len(every) == 1 else f", and a process has {min(every)} of the choice and takes 1"
        raise ValueError(
            f"calibration, choice and proof have {len(rows.calibration)}, {sum(every)} and {batches} batches; "
            f"they take 2, 2 and {LEAST}, and 30 make them good{each}: give more rows"
        )
    if batches < FEW:
        warnings.warn(f"the proof has {batches} batches, so its interval is wide; give more rows", stacklevel=3)
    fitting = _Fitting(judge, rows, wanted, adapter)
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


class _Held:
    """Held-out rows on which any size is compared with the whole adapter, batch by batch."""

    def __init__(
        self, fitting: _Fitting, batches: Sequence[Batch], predicts: bool = False, judge: Judge | None = None
    ) -> None:
        self._fitting, self._batches, self._predicts = fitting, batches, predicts
        self._judge = judge or fitting.judge
        self.weights = gather_object([self._judge.samples(batch) for batch in batches])
        self.metrics: Metrics = {}
        """Of the last pass."""
        self.whole = self._all(self._judge.whole, partial(evaluating, fitting.model))

    def _all(self, judged: Any, cut: Cut) -> list[float]:
        predictions: Predictions | None = [] if self._predicts else None
        losses = list(self._fitting.counted(judged(self._batches, cut, predictions)))
        if predictions is not None:
            self.metrics = self._judge.metrics(gather_object(predictions))
        return gather_object(losses)

    def losses(self, cut: Cut) -> list[float]:
        """Of each batch, of all processes, with the model that `cut` makes."""
        return self._all(self._judge.losses, cut)

    def increase(self, cut: Cut) -> Increase:
        """Mean rise of the loss with the model that `cut` makes, and its standard error."""
        return paired(self.whole, self.losses(cut), self.weights)


class _Fitting:
    """One fit."""

    def __init__(self, judge: Judge, rows: Rows, wanted: Wanted, adapter: str) -> None:
        self.judge, self.model, self.rows, self.wanted, self.adapter = judge, judge.model, rows, wanted, adapter
        self.bar = tqdm(disable=True)
        self.steps = self._steps()
        self.layers = lora_layers(self.model, adapter)
        self.shape = wanted.shape([*self.layers], has_more(self.model, adapter))
        self.recovered: dict[int, Factors] = {}
        """Place on the ladder -> factors after recovery."""
        self.metrics: dict[int, Metrics] = {}
        """Place on the ladder -> metrics on the rows of the proof."""

    def _steps(self) -> int:
        """Of recovery; none by default where the model gives nothing that can be compared."""
        steps, batches = self.wanted.recover, self.rows.calibration
        if steps and self.rows.general:
            raise ValueError("recovery learns what the whole adapter says, and what it forgets too; leave recover out")
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
            raise ValueError(f"recovery compares what the model says, and {why}; leave recover out")
        if not gives:
            logger.warning("fit: no recovery, which compares what the model says, because %s", why)
            return 0
        return min(RECOVERY, PASSES * len(batches)) if steps is None else steps

    def run(self, shown: bool) -> Fit:
        wanted = self.wanted
        self._estimate(shown)
        self.bar.set_description("calibration")
        seen = self.counted(self.rows.calibration)
        self.calibration = calibrate(self.judge, seen, adapter=self.adapter)
        if general := self.rows.general:
            self.bar.set_description("what harms general text")
            task = self._slopes(self.judge, self.rows.calibration)
            harm = self._slopes(general.judge, general.slopes)
            self.calibration, harm = harm_first(self.calibration, task, harm)
            self.ladder = HarmLadder(self.calibration, self.shape, harm)
        else:
            self.ladder = Ladder(self.calibration, self.shape)
        asked = None if wanted.parameters is None else self.ladder.within(wanted.parameters)
        self.bar.set_description("whole adapter")
        self.choice, self.proof = _Held(self, self.rows.choice), _Held(self, self.rows.proof, predicts=True)
        metrics = {"base": {}, "whole": self.proof.metrics}
        self.bar.set_description("base model")
        base = partial(disabled, self.model)
        losses = self.choice.losses(base) + self.proof.losses(base)
        metrics["base"] = self.proof.metrics
        won = paired(self.choice.whole + self.proof.whole, losses, self.choice.weights + self.proof.weights)
        limit = Tolerance(won, wanted.tolerance)
        search = Search(
            self.ladder,
            limit,
            measure=self._measure,
            recover=self._recover if self.steps else None,
            prove=self._prove,
            ahead=self._ahead(),
        )
        if wanted.curve and not limit.learned:  # else it is measured on the way
            search.measure_curve()
        if asked is not None:
            chosen = self._taken(search, asked)
        else:
            chosen = search.choose(wanted.curve) if limit.learned else None
            if chosen is None and not self.ladder.is_whole(0):
                raise NotWithin(self._refusal(search, limit))
        return self._found(search, chosen, limit, metrics)

    def _slopes(self, judge: Judge, batches: Sequence[Batch]) -> Slopes:
        return slopes_at_half(judge, self.counted(batches), self.calibration, adapter=self.adapter)

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, each told as a batch that is done."""
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

    def _taken(self, search: Search, index: int) -> Point | None:
        """The size that was asked for, measured and proved; None where it is the whole adapter."""
        if self.ladder.is_whole(index):
            return None
        if self.wanted.curve:
            search.measure_curve()
        search.measured(index)
        search.recovered(index)
        return search.proved(index)

    def _found(self, search: Search, chosen: Point | None, limit: Tolerance, metrics: Mapping[str, Metrics]) -> Fit:
        place = next((index for index, each in search.points.items() if each is chosen), None)
        everything = point(self.calibration, whole(self.calibration))
        if chosen is None or place is None:
            chosen, smaller = everything, {}
        else:
            smaller = self.metrics[place]
        if place is not None and chosen.gains_by_recovery:
            factors = self.recovered[place]
        else:
            factors = cut_factors(self.model, self.calibration, chosen.ranks, self.adapter)
        forgetting = self._forgetting(chosen.ranks)
        curve = search.curve if any(each.share == 1 for each in search.curve) else [everything, *search.curve]
        ranks = {layer.rank for layer in self.calibration.layers.values()}
        rank = ranks.pop() if len(ranks) == 1 else None
        kind, words = verdict(chosen, curve, limit, rank, self.judge.measure, free=self.shape.is_free)
        if forgetting is not None and limit.learned:
            kind, words = forgetting.verdict(cut=place is not None)
        if self.wanted.parameters is not None and chosen.share == 1:
            words = (
                f"unknown: the adapter has {chosen.parameters:,} parameters, no more than the "
                f"{self.wanted.parameters:,} that were asked for, so nothing is cut"
            )
        return Fit(
            calibration=self.calibration,
            curve=curve,
            chosen=chosen,
            tolerance=limit,
            asked=self.wanted.parameters is not None,
            recover_steps=self.steps if self.recovered else 0,
            factors={name: (A.clone(), B.clone()) for name, (A, B) in factors.items()},
            verdict=kind,
            words=words,
            measure=self.judge.measure,
            forgetting=forgetting,
            rows=self.rows.told,
            metrics={name: each for name, each in {**metrics, "smaller": smaller}.items() if each},
            model=self.model,
            adapter=self.adapter,
        )

    def _forgetting(self, ranks: Ranks) -> Forgetting | None:
        """What this size does to general text, where there is some."""
        if self.rows.general is None:
            return None
        self.bar.set_description("general text")
        held = _Held(self, self.rows.general.proof, judge=self.rows.general.judge)
        base = held.losses(partial(disabled, self.model))
        smaller = held.losses(partial(truncated, self.model, self.calibration, ranks, self.adapter))
        return Forgetting(
            whole=paired(base, held.whole, held.weights),
            smaller=paired(base, smaller, held.weights),
            undone=paired(held.whole, smaller, held.weights),
        )

    def _refusal(self, search: Search, limit: Tolerance) -> str:
        """Why no size of the wanted shape is taken: what the largest does to the loss, and the nearest that can be."""
        wanted, top = self.wanted, search.point(0)
        named = {"max_rank": wanted.max_rank, "drop_types": ",".join(wanted.drop_types)}
        shape = " and ".join(f"{name} {value}" for name, value in named.items() if value)
        what = f"with {shape} at most {top.parameters:,} of {self.ladder.everything:,} parameters are left"
        if not limit.learned:
            return (
                f"{what}, but the adapter has not lowered the {self.judge.measure} beyond its noise, so no size can be "
                f"held to a tolerance; give parameters {top.parameters} to take it whatever it does"
            )
        rise = top.proof or search.measured(0).best
        assert rise is not None
        repairs, rank = ["a larger tolerance", "more rows"], wanted.max_rank
        highest = max(layer.rank for layer in self.calibration.layers.values())
        while rank is not None and 2 * rank < highest:
            rank *= 2
            ladder = Ladder(self.calibration, replace(self.shape, max_rank=rank))
            cut = partial(truncated, self.model, self.calibration, ladder.point(0).ranks, self.adapter)
            if limit.allows(self.choice.increase(cut), *self._ahead()):
                repairs.insert(0, f"max_rank {rank} (it seems to be within)")
                break
        return (
            f"{what}, and the {self.judge.measure} rises by {rise.mean:.3g} ± {rise.error:.2g}, which is not within "
            f"the tolerance of {limit.loss:.3g}; give {', '.join(repairs)}, or parameters {top.parameters} to take it "
            f"whatever it does"
        )

    def _ahead(self) -> tuple[float, int]:
        """Of the proof, its standard error as a part of that of the choice, by their samples; and its batches."""
        return (sum(self.choice.weights) / sum(self.proof.weights)) ** 0.5, len(self.proof.weights)

    def _cut(self, index: int, recovers: bool) -> Cut:
        if recovers:
            return partial(recovered, self.model, self.recovered[index], self.adapter)
        return partial(truncated, self.model, self.calibration, self.ladder.point(index).ranks, self.adapter)

    def _measure(self, index: int) -> Increase:
        self.bar.set_description(f"choice, {self.ladder.share(index):.1%}")
        return self.choice.increase(self._cut(index, False))

    def _recover(self, index: int) -> Increase:
        self.bar.set_description(f"recovery, {self.ladder.share(index):.1%}")
        factors = cut_factors(self.model, self.calibration, self.ladder.point(index).ranks, self.adapter)
        self.recovered[index] = distill(self.judge, factors, self.rows.calibration, self.steps, adapter=self.adapter)
        return self.choice.increase(self._cut(index, True))

    def _prove(self, index: int, recovers: bool) -> Increase:
        self.bar.set_description(f"proof, {self.ladder.share(index):.1%}")
        found = self.proof.increase(self._cut(index, recovers))
        self.metrics[index] = self.proof.metrics
        return found

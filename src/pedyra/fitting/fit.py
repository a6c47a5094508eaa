"""A fit cuts the smallest adapter that does the job out of one that is trained, and proves it on rows of its own."""

from __future__ import annotations

import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from accelerate.utils import gather_object
from tqdm.auto import tqdm

from pedyra.errors import UserError
from pedyra.fitting.calibration import Calibration, calibrate, seconds_a_batch
from pedyra.fitting.cut import check_read, cut_factors, cut_to
from pedyra.fitting.held import Against, Answers, Held
from pedyra.fitting.judge import Batch, Cut, Judge
from pedyra.fitting.modes import disabled
from pedyra.fitting.result import Fit
from pedyra.fitting.search import FEW, LEAST, proved, search
from pedyra.fitting.sizes import Candidate, of_rank, ranks_below, size, whole
from pedyra.fitting.verdict import Tolerance, verdict
from pedyra.fitting.wanted import Wanted

logger = logging.getLogger(__name__)

PLAIN_BASE = "the base model"
"""The base is called so where the adapter is only switched off."""
Base = tuple[Cut, str]
"""The first makes the model the one that what was won is counted from, and the second names it."""
Shown = Literal["nothing", "estimate", "bar"]
"""The screen shows the time that a fit takes: not at all, as an estimate beforehand, or with a bar as well."""


class NotWithin(UserError):
    """No size that can be held where the adapter will be served is within the tolerance; the message says what the
    largest of them costs."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A fit takes these batches, on this process."""

    calibration: Sequence[Batch]
    """Gradients come from rows like those the adapter was trained on."""
    held: Sequence[Batch]
    """The proof needs rows that it was not trained on."""
    told: str = ""
    """A result names the rows in these words."""


def fit_batches(
    judge: Judge,
    rows: Rows,
    wanted: Wanted,
    *,
    ranks: Sequence[int] = (),
    base: Base | None = None,
    adapter: str = "default",
    shown: Shown = "nothing",
) -> Fit:
    """Find how small the LoRA of the judge's model may be. The model stays as it is. `pedyra.fit` is this with a
    Trainer.

    The processes of accelerate hold other batches of the same rows, and all of them find the same. A held-out batch in
    which nothing has a label (prompts that were cut before their completion) has no loss and is left out, in every
    process.

    Args:
        ranks: those that the place takes where the adapter will be served, from the largest down; by default
            `ranks_below` of the adapter's own.
        base: what makes the model the one that what was won is counted from, and what it is called; by default the
            adapter is switched off.
        shown: on the screen: an estimate before the work begins, and a progress bar with it.

    Raises:
        NotWithin: the place does not take the whole adapter, and its largest rank is not within tolerance.
        UserError: too few batches, or a layer that was not seen.
    """
    held = labelled(judge, rows.held)
    rows = replace(rows, held=held)
    batches = sum(gather_object([len(held)]))
    if batches < LEAST or len(rows.calibration) < 2:
        raise UserError(
            f"there are {len(rows.calibration)} batches to calibrate and {batches} of held-out rows; a fit takes 2 and "
            f"{LEAST}, and 60 make it good: give more rows"
        )
    if batches < FEW:
        warnings.warn(f"there are {batches} batches of held-out rows, so the interval is wide; give more", stacklevel=3)
    fitting = _Fitting(judge, rows, wanted, adapter, [*ranks], base or (partial(disabled, judge.model), PLAIN_BASE))
    try:
        return fitting.run(shown)
    finally:
        fitting.bar.total = fitting.bar.n
        fitting.bar.set_description("fit")
        fitting.bar.close()


def labelled(judge: Judge, batches: Sequence[Batch]) -> list[Batch]:
    """Return the batches that have labels here and in every other process. A Trainer's loss may gather over the
    processes, so all of them have to be at the same place."""
    every = gather_object([[judge.samples(batch) > 0 for batch in batches]])
    return [batch for place, batch in enumerate(batches) if all(has[place] for has in every if place < len(has))]


class _Fitting:
    """One fit runs once, and keeps here what its steps share."""

    def __init__(self, judge: Judge, rows: Rows, wanted: Wanted, adapter: str, ranks: list[int], base: Base) -> None:
        self.judge, self.model, self.rows, self.wanted, self.adapter = judge, judge.model, rows, wanted, adapter
        self.ranks, (self.base, self.base_told) = ranks, base
        self.bar = tqdm(disable=True)
        self.step = 1.0
        """A batch takes this number of seconds forwards and backwards."""

    def run(self, shown: Shown) -> Fit:
        began = time.perf_counter()
        self._estimate(shown)
        self.bar.set_description("whole adapter")
        held = Held(self.judge, self.rows.held, self._counted)
        if self.wanted.points is not None and held.correct is None:
            raise UserError(
                f"tolerance is {self.wanted.tolerance}, and this task has no accuracy of rows; give a part of what was "
                f"won, such as 1%, or a Trainer whose compute_metrics returns the accuracy"
            )
        calibration, sizes = self._calibrated()
        self.bar.set_description("base model")
        losses, of_base = held.losses(self.base)
        limit = Tolerance(held.risen(losses), self.wanted.part, self.wanted.points)

        everything = size(calibration, whole(calibration))
        sizes = [each for each in sizes if each.ranks != everything.ranks]
        taken, asked = self._asked(calibration, everything, sizes, held, limit)
        factors = cut_factors(self.model, calibration, taken.ranks, self.adapter)
        curve = [everything, *asked]
        kind, words = verdict(taken, curve, limit, self.judge.measure)
        smaller = taken.proof.metrics if taken.proof else {}
        metrics = {"base": of_base, "whole": held.metrics, **({} if taken is everything else {"smaller": smaller})}
        return Fit(
            whole=everything,
            curve=curve,
            chosen=taken,
            tolerance=limit,
            asked=self.wanted.rank is not None,
            factors={name: (A.clone(), B.clone()) for name, (A, B) in factors.items()},
            verdict=kind,
            words=words,
            measure=self.judge.measure,
            rows=self.rows.told,
            base=self.base_told,
            seconds=(seconds := time.perf_counter() - began),
            steps=seconds / self.step,
            metrics={name: each for name, each in metrics.items() if each},
            model=self.model,
            adapter=self.adapter,
        )

    def _asked(
        self, calibration: Calibration, everything: Candidate, sizes: list[Candidate], held: Held, limit: Tolerance
    ) -> tuple[Candidate, list[Candidate]]:
        """Return the size that is taken, and those that were asked, each with what was found of it."""
        answers: dict[tuple[int, ...], Answers] = defaultdict(Answers)
        read: dict[tuple[int, ...], set[str]] = defaultdict(set)

        def smaller(each: Candidate) -> tuple[Cut, Answers]:
            factors = cut_factors(self.model, calibration, each.ranks, self.adapter)
            key = (*each.ranks.values(),)
            return partial(cut_to, self.model, factors, self.adapter, read[key]), answers[key]

        def ask(each: Candidate, part: float) -> Against:
            self.bar.set_description(f"rank {each.rank}, {each.share:.1%}")
            cut, known = smaller(each)
            return held.compared(cut, part, known)

        taken, asked = everything, []
        if self.wanted.rank is not None:  # whatever it does
            asked = [proved(each, limit, ask(each, 1.0)) for each in sizes]
            taken = asked[0] if asked else everything
        elif limit.learned:
            asked = search(sizes, limit, ask, held.batches)
            taken = next((each for each in reversed(asked) if each.accepted), everything)
        if self.wanted.rank is None and taken is everything and self.ranks and self.ranks[0] < everything.rank:
            raise NotWithin(_refusal(self.ranks[0], asked, limit, self.judge.measure))
        if self.wanted.curve:
            asked += [replace(each, proof=ask(each, 1.0)) for each in sizes[len(asked) :]]
        if asked:
            check_read(self.model, taken.ranks, gather_object([*read[(*taken.ranks.values(),)]]), self.adapter)
            # The whole adapter comes before and after, so that a layer which keeps weights has those of another size.
            if not (held.repeats() and (taken is everything or held.repeats(*smaller(taken))) and held.repeats()):
                raise UserError(
                    "a layer goes on with weights that it computed for another size: the same model gives another loss "
                    "on the same rows the second time; load the adapter in plain PEFT with `pedyra fit FOLDER`"
                )
        return taken, asked

    def _calibrated(self) -> tuple[Calibration, list[Candidate]]:
        """Calibrate, and list the sizes to ask, from the largest down."""
        self.bar.set_description("calibration")
        began = time.perf_counter()
        found = calibrate(self.judge, self._counted(self.rows.calibration), adapter=self.adapter)
        self.step = (time.perf_counter() - began) / len(self.rows.calibration)
        highest = max(whole(found).values())
        ranks = [self.wanted.rank] if self.wanted.rank is not None else self.ranks or ranks_below(highest)
        return found, [of_rank(found, rank) for rank in ranks]

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            yield item
            self.bar.update()

    def _estimate(self, shown: Shown) -> None:
        """Tell how long it takes at most, by one batch of each kind."""
        calibration, held = len(self.rows.calibration), len(self.rows.held)
        calibrated, evaluated = seconds_a_batch(self.judge, self.rows.calibration[0], self.rows.held[0], self.adapter)
        sizes = 1 if self.wanted.rank is not None else len(self.ranks) or 6
        seconds = calibration * calibrated + (2 + sizes) * held * evaluated
        long = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        steps = seconds / calibrated if calibrated else 0
        text = (
            f"fit: {calibration} batches to calibrate, and about {2 + sizes} evaluations of {held} held-out batches at "
            f"most: about {long}, or {steps:.0f} training steps of {self._size()} rows"
        )
        logger.info(text)
        if shown != "nothing":
            print(text, flush=True)  # before the work, in a pipe too
        if shown == "bar":
            self.bar = tqdm(total=calibration + (2 + sizes) * held, unit="batch")

    def _size(self) -> int:
        """Count the rows of a batch of the calibration."""
        return next((len(each) for each in self.rows.calibration[0].values() if hasattr(each, "__len__")), 1)


def _refusal(largest: int, asked: Sequence[Candidate], limit: Tolerance, measure: str) -> str:
    """Say what the largest rank that the place takes costs, and what can be asked instead."""
    told, name = f"rank {largest} is the largest that the place takes, and", "name the rank to take it whatever it does"
    if not asked or asked[0].proof is None:
        won = f"{limit.won.mean:+.3g} ± {limit.won.error:.2g}"
        return (
            f"{told} the adapter has not lowered the {measure} beyond its noise ({won}), so nothing tells whether that "
            f"is enough; give more rows, or {name}"
        )
    rise = asked[0].proof.rise
    allowed = f"{100 * limit.points:.2g}pt of the accuracy" if limit.points is not None else f"{limit.loss:.3g}"
    return (
        f"{told} with it the {measure} rises by {rise.mean:.3g} ± {rise.error:.2g}, which is not within the tolerance "
        f"of {allowed}; give a larger tolerance or more rows, or {name}"
    )

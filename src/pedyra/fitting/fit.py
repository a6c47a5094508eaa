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

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from pedyra.errors import UserError
from pedyra.export.destinations import Destination
from pedyra.fitting.calibration import calibrate, does_something, lora_layers, seconds_a_batch
from pedyra.fitting.choice import PASSES, Choice, choosing
from pedyra.fitting.cut import check_read, cut_to
from pedyra.fitting.heldout import Answers, Comparison, HeldOut
from pedyra.fitting.judge import Batch, Cut, Judge
from pedyra.fitting.logits import NUMBERS
from pedyra.fitting.modes import disabled, evaluating
from pedyra.fitting.request import FitRequest
from pedyra.fitting.result import Fit
from pedyra.fitting.search import FEW, LEAST, search, with_proof
from pedyra.fitting.sizes import Candidate, ranks_at, ranks_below
from pedyra.fitting.verdict import Tolerance, verdict

logger = logging.getLogger(__name__)

PLAIN_BASE = "the base model"
"""The name of the base model, which is the live one with the adapter switched off."""
Base = tuple[Cut, str]
"""A context manager that makes the live model the one from which the gain is counted, and the name of that model."""
CALIBRATING = 1024
"""By default at most this number of rows calibrate, and at least as many prove."""
Shown = Literal["nothing", "estimate", "bar"]
"""What the screen shows of the time that a fit takes: nothing, an estimate beforehand, or a progress bar as well."""


class NotWithin(UserError):
    """No size that the destination takes is within the tolerance; the message says what the largest of them costs."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The batches of a fit, on this process."""

    calibration: Sequence[Batch]
    """Of rows like those that the adapter was trained on."""
    heldout: Sequence[Batch]
    """Of rows that it was not trained on."""
    unlabelled: bool = False
    name: str = ""
    """What the held-out rows are called."""
    counts: tuple[int, int] = (0, 0)
    """How many rows calibrate, and how many prove, in all processes."""
    a_batch: int = 1
    """Held-out rows in a batch of all processes together."""

    def __str__(self) -> str:
        calibrating, proving = self.counts
        return f"{calibrating:,} to calibrate, {proving:,} of {self.name} to prove by" if self.name else ""


def fit_batches(
    judge: Judge,
    rows: Rows,
    request: FitRequest,
    *,
    place: Destination | None = None,
    base: Base | None = None,
    adapter: str = "default",
    shown: Shown = "nothing",
) -> Fit:
    """Find how small the LoRA of the judge's model may be. The model stays as it is. `pedyra.fit` is this with a
    Trainer.

    The processes of accelerate hold other batches of the same rows, and have the same result. A held-out batch in which
    nothing has a label (prompts that were cut before their completion) has no loss and is left out, in every process.

    Args:
        place: where the adapter will be served: the ranks that it takes are measured, by default `ranks_below` of the
            adapter's own, and a layer whose LoRA it leaves out keeps none.
        base: the model from which the gain is counted; by default the live one with the adapter switched off.

    Raises:
        NotWithin: the place does not take the whole adapter, and its largest rank is not within tolerance.
        UserError: too few batches, or a layer that was not seen.
    """
    check_labels(rows, "tolerance", request.tolerance)
    heldout = labelled(judge, rows.heldout)
    rows = replace(rows, heldout=heldout)
    batches = sum(gather_object([len(heldout)]))
    if batches < LEAST or len(rows.calibration) < 2:
        raise UserError(
            f"there are {len(rows.calibration)} batches to calibrate and {batches} of held-out rows; a fit takes 2 and "
            f"{LEAST}, and 60 make it good: give more rows"
        )
    if batches < FEW:
        warnings.warn(f"there are {batches} batches of held-out rows, so the interval is wide; give more", stacklevel=3)
    if request.changed is not None:
        with evaluating(judge.model), torch.no_grad():
            if judge.answers(heldout[0]) is None:
                raise UserError(f"changed is {request.changed}; {NUMBERS}")
    fitting = _Fitting(judge, rows, request, adapter, place, base or (partial(disabled, judge.model), PLAIN_BASE))
    try:
        return fitting.run(shown)
    finally:
        fitting.bar.total = fitting.bar.n
        fitting.bar.set_description("fit")
        fitting.bar.close()


def check_labels(rows: Rows, name: str, limit: object) -> None:
    """Refuse a limit, of this name, of the loss or the accuracy for rows without labels: ValueError."""
    if rows.unlabelled and limit is not None:
        raise UserError(
            f"{name} is {limit}, and {rows.name} has no labels, which tell a loss and an accuracy; ask for a "
            f"share of the answers (changed 2%), or give labels"
        )


def labelled(judge: Judge, batches: Sequence[Batch]) -> list[Batch]:
    """Return the batches that have labels here and in every other process. A Trainer's loss may gather over the
    processes, so all of them have to be at the same place."""
    every = gather_object([[judge.samples(batch) > 0 for batch in batches]])
    return [batch for place, batch in enumerate(batches) if all(has[place] for has in every if place < len(has))]


class _Fitting:
    """One calibration and its held-out rows, which answer for one tolerance after the other."""

    def __init__(
        self, judge: Judge, rows: Rows, request: FitRequest, adapter: str, place: Destination | None, base: Base
    ) -> None:
        self.judge, self.model, self.rows, self.request, self.adapter = judge, judge.model, rows, request, adapter
        self.place, (self.base, self.base_name) = place, base
        layers = lora_layers(self.model, adapter)
        highest = max(len(layer.lora_A[adapter].weight) for layer in layers.values())
        self.ranks = ranks_below(highest) if place is None else ranks_at(place, highest)
        names = [] if place is None else place.dropped(layers)
        self.dropped = [name for name in names if does_something(layers[name], adapter)]
        self.bar = tqdm(disable=True)
        self.step = 1.0
        """Seconds that a batch takes forwards and backwards."""
        self.answers: dict[tuple[Any, ...], Answers] = defaultdict(Answers)
        """The answers of each size to the held-out batches."""
        self.readers: dict[tuple[Any, ...], set[str]] = defaultdict(set)
        """The layers that have read the factors of each size."""

    def run(self, shown: Shown) -> Fit:
        began = time.perf_counter()
        self._estimate(shown)
        self.bar.set_description("whole adapter")
        self.heldout = HeldOut(self.judge, self.rows.heldout, self._with_bar)
        self._with_default(self.request)
        self.choice = self._choice_of_cuts()
        self.gain, self.of_base = None, {}
        if not self.rows.unlabelled:
            self.bar.set_description("base model")
            comparison = self.heldout.comparison(self.base)
            self.gain, self.of_base = comparison.rise, comparison.metrics
        self.factors = _sums(self.model, self.adapter)
        return self._result(self.request, began)

    def at(self, tolerance: Any = None, changed: Any = None) -> Fit:
        """Find the size for another tolerance, by the same calibration and the same held-out rows."""
        if _sums(self.model, self.adapter) != self.factors:
            raise UserError("the live adapter has changed since its calibration (applied, or trained on); fit it anew")
        self.bar = tqdm(disable=True)
        return self._result(replace(self.request, tolerance=tolerance, changed=changed), time.perf_counter())

    def _with_default(self, request: FitRequest) -> tuple[FitRequest, str]:
        """Return the request with its tolerance, and, where that is the default, the reason. Raises UserError: points
        without an accuracy, a tolerance of rows without labels."""
        check_labels(self.rows, "tolerance", request.tolerance)
        if request.limit[1] == "accuracy" and self.heldout.correct is None:
            raise UserError(
                f"tolerance is {request.tolerance}, and this task has no accuracy of rows; give a share of the answers "
                f"(changed 2%), a part of the gain, such as 1%, or a Trainer whose compute_metrics returns the "
                f"accuracy"
            )
        if str(request):
            return request, ""
        if self.rows.unlabelled:
            return replace(request, changed="2%"), "the default for rows without labels"
        if self.heldout.correct is not None:
            why = "the default where rows have an accuracy; or ask changed 2%, or 1%"
            return replace(request, tolerance="1pt"), why
        return replace(request, tolerance="1%"), "the default where rows have no accuracy; or ask changed 2%"

    def _result(self, request: FitRequest, began: float) -> Fit:
        request, why = self._with_default(request)
        limit = Tolerance(self.gain, *request.limit)
        everything = self.choice.whole
        sizes = (self.choice.of_rank(rank) for rank in (self.ranks if request.rank is None else [request.rank]))
        chosen, candidates = self._search(everything, (each for each in sizes if each.ranks != everything.ranks), limit)
        factors = self.choice.factors(chosen)
        curve = [everything, *candidates]
        kind, words = verdict(chosen, curve, limit, self.judge.measure)
        smaller = chosen.proof.metrics if chosen.proof else {}
        metrics = {"base": self.of_base, "whole": self.heldout.metrics}
        metrics |= {} if chosen is everything else {"smaller": smaller}
        return Fit(
            whole=everything,
            curve=curve,
            chosen=chosen,
            tolerance=limit,
            why=why,
            by_rank=request.rank is not None,
            factors={name: (A.clone(), B.clone()) for name, (A, B) in factors.items()},
            verdict=kind,
            words=words,
            measure=self.judge.measure,
            rows=str(self.rows),
            base=self.base_name,
            seconds=(seconds := time.perf_counter() - began),
            steps=seconds / self.step,
            metrics={name: each for name, each in metrics.items() if each},
            model=self.model,
            adapter=self.adapter,
            place=self.place,
            again=self.at,
        )

    def _search(
        self, everything: Candidate, sizes: Iterator[Candidate], limit: Tolerance
    ) -> tuple[Candidate, list[Candidate]]:
        """Return the size that is taken, and those that were asked, each with its measurement."""

        def smaller(each: Candidate) -> tuple[Cut, Answers]:
            key = _key(each)
            factors = self.choice.factors(each)
            return partial(cut_to, self.model, factors, self.adapter, self.readers[key]), self.answers[key]

        def ask(each: Candidate, part: float) -> Comparison:
            self.bar.set_description(f"rank {each.rank}, {each.share:.1%}")
            cut, earlier = smaller(each)
            measure = self.heldout.changes if limit.of == "answers" else self.heldout.comparison
            return measure(cut, part, earlier)

        chosen, candidates = everything, []
        if self.request.rank is not None:  # whatever it does
            candidates = [with_proof(each, limit, ask(each, 1.0)) for each in sizes]
            chosen = candidates[0] if candidates else everything
        elif limit.learned:
            candidates = search(sizes, limit, ask, self.heldout.batches)
            chosen = next((each for each in reversed(candidates) if each.accepted), everything)
        highest = self.ranks[0] if self.place is not None else everything.rank
        if self.request.rank is None and chosen is everything and (highest < everything.rank or self.dropped):
            without = f" without {' and '.join(self.dropped)}" if self.dropped else ""
            largest = f"rank {min(highest, everything.rank)}{without}"
            raise NotWithin(_refusal(largest, candidates, limit, self.judge.measure))
        if self.request.curve:
            candidates += [replace(each, proof=ask(each, 1.0)) for each in sizes]
        if candidates:
            # All is measured of the size that is taken, or, where the adapter is kept whole, of the largest size.
            place, heldout = 0 if chosen is everything else candidates.index(chosen), self.heldout
            each = candidates[place]
            candidates[place] = replace(each, proof=self._everything(each, *smaller(each), limit))
            chosen = everything if chosen is everything else candidates[place]
            check_read(self.model, chosen.ranks, gather_object([*self.readers[_key(chosen)]]), self.adapter)
            # The whole adapter comes before and after, so that a layer which keeps weights has those of another size.
            repeats = heldout.repeats() and (chosen is everything or heldout.repeats(*smaller(chosen)))
            if not (repeats and heldout.repeats()):
                raise UserError(
                    "a layer goes on with weights that it computed for another size: the same model gives another loss "
                    "on the same rows the second time; load the adapter in plain PEFT with `pedyra fit FOLDER`"
                )
        return chosen, candidates

    def _everything(self, each: Candidate, cut: Cut, earlier: Answers, limit: Tolerance) -> Comparison | None:
        """Measure the loss and the answers of the size on all rows, whichever of them decides."""
        if each.proof is None:
            return None
        proof = Comparison(batches=self.heldout.batches)
        if not self.rows.unlabelled:
            proof = self.heldout.comparison(cut, 1.0, earlier)
        if self.judge.writes or limit.of != "answers":
            answers = self.heldout.answers(cut)
            return replace(proof, changed=answers.changed, per_token=answers.per_token)
        return replace(proof, changed=self.heldout.changes(cut, 1.0, earlier).changed)

    def _choice_of_cuts(self) -> Choice:
        self.bar.set_description("calibration")
        batches, began = self.rows.calibration, time.perf_counter()
        apart = len(batches) - self._apart()
        calibration = calibrate(self.judge, self._with_bar(batches[:apart]), adapter=self.adapter)
        self.step = (time.perf_counter() - began) / apart
        mixed = self.place is None and self.request.rank is None
        return Choice(self.judge, calibration, batches[apart:], self.adapter, mixed=mixed, without=self.dropped)

    def _apart(self) -> int:
        """Count the calibration batches that choose among cuts, and calibrate nothing."""
        return choosing(sum(gather_object([len(self.rows.calibration)])), PartialState().num_processes)

    def _with_bar(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            yield item
            self.bar.update()

    def _estimate(self, shown: Shown) -> None:
        """Say how long the fit takes at most, by one batch of each kind. Where no number of rows was asked, held-out
        rows that would take one model longer than the calibration are left out."""
        calibration = len(self.rows.calibration)
        one, other = self.rows.calibration[0], self.rows.heldout[0]
        calibrated, evaluated = seconds_a_batch(self.judge, one, other, self.adapter)
        if self.request.rows is None:
            most = max(CALIBRATING // self.rows.a_batch, int(calibration * calibrated / max(evaluated, 1e-9)))
            batches, (calibrating, proving) = min(gather_object([most])), self.rows.counts
            counts = calibrating, min(proving, batches * self.rows.a_batch)
            self.rows = replace(self.rows, heldout=self.rows.heldout[:batches], counts=counts)
        heldout = len(self.rows.heldout)
        sizes = 1 if self.request.rank is not None else len(self.ranks)
        chosen = PASSES * self._apart() * evaluated
        fixed = 1 if self.rows.unlabelled else 2  # the whole adapter, and the base model
        seconds = calibration * calibrated + fixed * heldout * evaluated + sizes * (heldout * evaluated + chosen)
        long = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        steps = seconds / calibrated if calibrated else 0
        text = (
            f"fit: {calibration} batches to calibrate, and about {fixed + sizes} evaluations of {heldout} held-out "
            f"batches at most: about {long}, or {steps:.0f} training steps of {self._size()} rows"
        )
        logger.info(text)
        if shown != "nothing":
            print(text, flush=True)  # before the work, in a pipe too
        if shown == "bar":
            self.bar = tqdm(total=calibration + (fixed + sizes) * heldout, unit="batch")

    def _size(self) -> int:
        """Count the rows of a batch of the calibration."""
        return next((len(each) for each in self.rows.calibration[0].values() if hasattr(each, "__len__")), 1)


def _refusal(largest: str, candidates: Sequence[Candidate], limit: Tolerance, measure: str) -> str:
    """Say what the largest size that the place takes costs, and what the user can do."""
    message, name = f"{largest} is the largest that the place takes, and", "name the rank to take it whatever it does"
    if (gain := limit.gain) is not None and not limit.learned:
        return (
            f"{message} the adapter has not lowered the {measure} beyond its noise ({gain.mean:+.3g} ± "
            f"{gain.error:.2g}), so nothing tells whether that is enough; give more rows, or {name}"
        )
    comparison = candidates[0].proof
    assert comparison is not None, "the largest size is always measured"
    allowed = f"{limit.loss:.3g}" if limit.of == "gain" else f"{limit} of the {limit.of}"
    cost = f"{limit.says(comparison, measure)} ± {limit.estimate(comparison).error:.2g}"
    return (
        f"{message} with it {cost}, which is not within the tolerance of {allowed}; give a larger tolerance or more "
        f"rows, or {name}"
    )


def _key(each: Candidate) -> tuple[Any, ...]:
    return (each.way, *each.ranks.values())


def _sums(model: Any, adapter: str) -> list[float]:
    """Sum each factor of the live adapter, to see whether it is the same later."""
    slots = ((layer.lora_A[adapter], layer.lora_B[adapter]) for layer in lora_layers(model, adapter).values())
    return [float(slot.weight.detach().double().sum()) for pair in slots for slot in pair]

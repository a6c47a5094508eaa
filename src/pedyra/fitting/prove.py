"""Is B no worse than A, by a margin? The losses, accuracies and answers of both on the same rows say so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

from pedyra.errors import UserError
from pedyra.fitting.heldout import Comparison, Metrics
from pedyra.fitting.logits import NUMBERS
from pedyra.fitting.paired import Increase, Pairs, paired
from pedyra.fitting.request import amount, check_changed

NO_WORSE, WORSE, CANNOT_TELL = "no worse", "worse", "cannot tell"
POWER = 0.8
"""The probability with which `Proof.enough` rows tell, if the true difference is the one that was measured."""
NOTHING = Comparison()
MOST_ROWS = 10**8
"""A larger `Proof.enough` is left out."""


@dataclass(frozen=True)
class Margin:
    """How much worse than A B may be and still count as no worse."""

    value: float
    of: str
    """The value is a part of the "gain" of A over the base, a number of the "loss", a difference of the "accuracy", or
    a share of the "answers" that may be others than A's."""
    text: str
    why: str = ""
    """Why it is the default; empty where the user has given it."""

    @classmethod
    def read(cls, text: Any, measure: str = "loss") -> Margin:
        """Read it: 1% is a part of A's gain, 0.5pt points of the accuracy, "0.01 loss" a number of the measure. Raises
        ValueError."""
        value, unit = amount(text)
        of = {"%": "gain", "pt": "accuracy", measure: "loss"}.get(unit)
        if of is None or not 0 <= value < (math.inf if of == "loss" else 1):
            raise UserError(
                f"margin is {text!r}; it is 1% (a part of A's gain over the base), 0.5pt (points of the accuracy), or "
                f"'0.01 {measure}' (a number of it)"
            )
        return cls(value, of, str(text).strip())

    @classmethod
    def of_request(cls, margin: Any, changed: Any) -> Margin | None:
        """Read what the user asks, a margin or a share of the answers; None where it is neither. Raises ValueError."""
        if margin is not None and changed is not None:
            raise UserError(f"margin is {margin} and changed is {changed}; one of them decides, so leave out the other")
        if changed is None:
            return None if margin is None else cls.read(margin)
        check_changed(changed)
        value, _ = amount(changed)
        return cls(value, "answers", f"{100 * value:.3g}%")

    @classmethod
    def default(cls, *, labelled: bool, accuracy: bool) -> Margin:
        """Return the margin for rows with or without labels and an accuracy, where the user gives none."""
        if not labelled:
            return cls(0.02, "answers", "2%", "the default for rows without labels")
        if accuracy:
            return cls(0.01, "accuracy", "1pt", "the default where rows have an accuracy; or ask --changed 2%")
        return cls(0.01, "gain", "1%", "the default where rows have no accuracy; or ask --changed 2%")


@dataclass(frozen=True)
class Measurement:
    """The answers of one model to the rows of a proof."""

    losses: Sequence[float] = ()
    """One for each batch; none where rows have no labels."""
    metrics: Metrics = field(default_factory=dict)
    correct: Sequence[bool] | None = None
    """Whether each row is right; None where the task has no accuracy of rows."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Whether B is no worse than A; print it."""

    a: str
    b: str
    """Both as the user named them."""
    measure: str
    """What the margin is of: "loss", "accuracy" or "answers"."""
    difference: float
    """How much worse B is: the rise of the loss, the fall of the accuracy, or the share of the answers that differ."""
    standard_error: float
    """Where the margin is a part of A's gain, the noise of the gain is in it."""
    lower: float
    upper: float
    """The true difference lies below, and above, with a probability of 5 % each at most."""
    margin: float
    """In units of the measure."""
    margin_text: str
    """As the user wrote it."""
    verdict: str
    """One of "no worse", "worse" and "cannot tell"."""
    why: str = ""
    """Why the margin is the default; empty where the user has given it."""
    loss_a: float | None = None
    """None where the rows have no labels."""
    loss_b: float | None = None
    answers: Comparison = NOTHING
    """The share of the answers that differ, and llama.cpp's measures of tokens, where the models give answers."""
    gain: Increase | None = None
    """The loss of the base less that of A, where the margin is a part of it."""
    base: str = "the base model"
    """The model from which the gain is counted."""
    metric: str | None = None
    """The metric of which `metric_a` and `metric_b` are values; None where the task has none."""
    metric_a: float | None = None
    metric_b: float | None = None
    pairs: Pairs | None = None
    """The rows that one has right and the other wrong, where the task has an accuracy."""
    rows: int
    enough: int | None = None
    """How many rows would tell; None where these rows do, or no number can be said."""

    def row(self) -> dict[str, Any]:
        """Return the fields of its line of JSON."""
        names = (
            *("a", "b", "measure", "difference", "standard_error", "lower", "upper", "margin", "verdict"),
            *("metric", "metric_a", "metric_b", "loss_a", "loss_b", "rows", "enough"),
        )
        return {name: getattr(self, name) for name in names} | self.answers.row()

    def __str__(self) -> str:
        return "\n".join([_answer(self), *_facts(self)])


def compare(
    a: Measurement,
    b: Measurement,
    margin: Margin,
    base: Measurement | None = None,
    /,
    *,
    weights: Sequence[float],
    answers: Comparison = NOTHING,
    **facts: Any,
) -> Proof:
    """Prove by the measurements of A and B, and of the base, where the margin is a part of A's gain over it.

    Args:
        weights: the samples of each batch.
        answers: the comparison of the answers of A and B.
        facts: further fields of the proof: a, b, rows, base.

    Raises:
        ValueError: a margin of an accuracy, or of answers, that the task does not have.
    """
    rows, changed = facts["rows"], answers.changed
    both = None if a.correct is None or b.correct is None else Pairs.of(a.correct, b.correct)
    metric = next((name for name in a.metrics if name.endswith("accuracy")), next(iter(a.metrics), None))
    facts |= {"margin_text": margin.text, "why": margin.why, "pairs": both, "answers": answers}
    if a.losses:
        totals = (sum(w * loss for w, loss in zip(weights, each.losses, strict=True)) for each in (a, b))
        facts["loss_a"], facts["loss_b"] = (total / sum(weights) for total in totals)
    if metric is not None:
        facts |= {"metric": metric, "metric_a": a.metrics[metric], "metric_b": b.metrics.get(metric)}
    gain, limit, shift = None, margin.value, 0.0
    if margin.of == "accuracy":
        if (estimate := both) is None:
            raise UserError(f"margin is {margin.text}, and this task has no accuracy; give a part (1%), or '0.01 loss'")
    elif margin.of == "answers":
        if (estimate := changed) is None:
            raise UserError(f"changed is {margin.text}; {NUMBERS}")
    else:
        limits = [limit] * len(weights)
        if base is not None and margin.of == "gain":  # gain and difference are measured on the same rows
            gain = paired(a.losses, base.losses, weights)
            part = margin.value if gain.mean > 0 else 0.0
            limit, limits = part * gain.mean, [part * (y - x) for x, y in zip(a.losses, base.losses, strict=True)]
        estimate = paired([loss + more for loss, more in zip(a.losses, limits, strict=True)], b.losses, weights)
        shift = limit
    value, low, high = (shift + each for each in (estimate.mean, estimate.lower(), estimate.upper()))
    unlearned = gain is not None and gain.lower() <= 0
    verdict = NO_WORSE if high <= limit and not unlearned else WORSE if low > limit else CANNOT_TELL
    return Proof(
        measure=margin.of if margin.of in ("accuracy", "answers") else "loss",
        difference=value,
        standard_error=estimate.error,
        lower=low,
        upper=high,
        margin=limit,
        verdict=verdict,
        gain=gain,
        enough=_enough(value, (low, high), limit, estimate.error, rows)
        if verdict == CANNOT_TELL and not unlearned
        else None,
        **facts,
    )


def _enough(value: float, bounds: tuple[float, float], margin: float, error: float, rows: int) -> int | None:
    """Return how many rows would tell, if the true difference is the one that was measured: the distance of the bounds
    and the error shrink with the root of the rows."""
    away = value - margin
    reach = bounds[1] - value if away < 0 else value - bounds[0]
    reach_of_power = reach + NormalDist().inv_cdf(POWER) * error
    if away == 0 or not math.isfinite(reach_of_power):
        return None
    most = rows * (reach_of_power / away) ** 2
    return math.ceil(most) if most <= MOST_ROWS else None


def _answer(proof: Proof) -> str:
    """Say the verdict in words, with the bound that it stands on."""
    there = f"the {proof.measure} of B is {_beside(proof, proof.difference)}"
    if proof.measure == "answers":
        there = f"of B's answers {_beside(proof, proof.difference)} are others than A's"
    limit = f"the margin is {_plain(proof, proof.margin)}"
    if proof.verdict == NO_WORSE:
        bound = f"at worst {_beside(proof, proof.upper)} (95 %)"
        return f"no worse: B is no worse than A by the margin; {there}, {bound}; {limit}"
    if proof.verdict == WORSE:
        bound = f"at best {_beside(proof, proof.lower)} (95 %)"
        return f"worse: B is worse than A by more than the margin; {there}, {bound}; {limit}"
    if proof.gain is not None and proof.gain.lower() <= 0:
        return (
            f"cannot tell: A has not lowered the loss of the base beyond its noise ({proof.gain.mean:+.4f} ± "
            f"{proof.gain.error:.4f}), so a part of that is no margin; give more rows, or '0.01 loss'"
        )
    would = (
        "no number of rows that one has would tell, so near is the difference to the margin"
        if proof.enough is None
        else f"about {_rounded(proof.enough):,} rows would tell, and there were {proof.rows:,}"
    )
    return (
        f"cannot tell: {there}, and it may be {_beside(proof, proof.lower)} or {_beside(proof, proof.upper)}; {limit}; "
        f"{would}"
    )


def _facts(proof: Proof) -> list[str]:
    lines = [f"A           {proof.a}", f"B           {proof.b}"]
    if proof.loss_a is not None and proof.loss_b is not None:
        lines.append(f"loss        {proof.loss_a:.4f} -> {proof.loss_b:.4f}")
    if proof.metric_a is not None and proof.metric_b is not None:
        lines.append(f"metric      {proof.metric} {proof.metric_a:.4f} -> {proof.metric_b:.4f}")
    if proof.pairs is not None:
        lines.append(str(proof.pairs))
    lines += proof.answers.lines()
    if proof.gain is not None:
        gain = f"{proof.gain.mean:.4f} ± {proof.gain.error:.4f}"
        lines.append(f"margin      {proof.margin_text} of the {gain} that A won over {proof.base}")
    if proof.why:
        lines.append(f"asked       {proof.margin_text}, {proof.why}")
    return [*lines, f"rows        {proof.rows:,}, the same for both"]


def _beside(proof: Proof, worse: float) -> str:
    """Say how B differs from A: an accuracy that is worse is lower, a loss is higher."""
    if proof.measure == "answers":
        return f"{worse:.2%}"
    accuracy = proof.measure == "accuracy"
    away = f"{100 * abs(worse):.2f} points" if accuracy else f"{round(abs(worse), 6):.4g}"
    if not float(away.split()[0]):
        return "as high as that of A"
    return f"{away} {'lower' if (worse > 0) == accuracy else 'higher'}"


def _plain(proof: Proof, value: float) -> str:
    if proof.measure == "answers":
        return f"{100 * value:.3g}% of the answers"
    return f"{100 * value:.4g} points" if proof.measure == "accuracy" else f"{value:.4g}"


def _rounded(rows: int) -> int:
    """Round to two digits, upwards: it is no better known."""
    unit = 10 ** max(0, len(str(rows)) - 2)
    return math.ceil(rows / unit) * unit

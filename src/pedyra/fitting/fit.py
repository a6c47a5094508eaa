"""Fit: the smallest adapter that does the job, cut out of one that is trained, with a proof on rows of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pedyra.fitting.calibration import Batch, Loss, calibrate, evaluating, model_loss, truncated
from pedyra.fitting.curve import Point, Ranks, Shape, point, sizes, whole, within
from pedyra.fitting.gramians import Calibration
from pedyra.fitting.recover import (
    Factors,
    Outputs,
    check_steps,
    cut_factors,
    distill,
    model_outputs,
    recovered_curve,
    replaced,
)
from pedyra.fitting.samples import num_samples
from pedyra.fitting.verdict import Tolerance, in_words, paired, smallest_within, verdict

Progress = Callable[[str], None]
"""Told what is being done, in words."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a fit found. Costs are of the mean loss, against the adapter as it was; positive is worse."""

    calibration: Calibration
    curve: list[Point]
    """The sizes that were measured, the largest first, on the rows that the choice was made by."""
    chosen: Point
    """The size taken; the whole adapter where none smaller is within tolerance."""
    tolerance: Tolerance
    within_tolerance: bool
    """Whether the choice is within tolerance on the rows it was made by; False where the size was asked for."""
    proof: float | None
    """What the chosen size costs on rows that had no part in the choice; None where it is the whole adapter."""
    proof_standard_error: float | None
    recover_steps: int
    """Steps after a cut; the sizes that were tried with them have a cost after recovery."""
    factors: Factors | None
    """A and B of each layer after recovery; None where they are those that the cut gives."""
    verdict: str
    """flat, capacity-limited or unknown."""
    words: str
    """The verdict as a sentence."""

    @property
    def ranks(self) -> dict[str, int]:
        """Layer -> directions kept; 0: the layer leaves the adapter."""
        return self.chosen.ranks

    def row(self) -> dict[str, Any]:
        """The result as one row of plain values."""
        of, chosen = whole(self.calibration), self.chosen
        recovery = {
            "recover_steps": self.recover_steps,
            "cut_cost": chosen.measured,
            "recovered_cost": chosen.recovered,
            "recovered": chosen.gains_by_recovery,
        }
        return {
            "kept": sum(self.ranks.values()),
            "of": sum(of.values()),
            "parameters": chosen.parameters,
            "share": chosen.share,
            "predicted_cost": chosen.predicted,
            "measured_cost": self.proof,
            "standard_error": self.proof_standard_error,
            **({} if chosen.recovered is None else recovery),
            "tolerance": self.tolerance.loss,
            "won": self.tolerance.won,
            "verdict": self.verdict,
            "ranks": self.ranks,
        }

    def curve_rows(self) -> list[dict[str, Any]]:
        """One row a size of the curve."""
        return [
            {
                "kept": sum(each.ranks.values()),
                "parameters": each.parameters,
                "share": each.share,
                "predicted_cost": each.predicted,
                "measured_cost": each.measured,
                "standard_error": each.standard_error,
                "recovered_cost": each.recovered,
                "recovered_standard_error": each.recovered_standard_error,
                "tolerance": self.tolerance.loss,
                "chosen": each.ranks == self.chosen.ranks,
            }
            for each in self.curve
        ]


def fit_adapter(
    model: nn.Module,
    calibration: Iterable[Batch],
    choice: Sequence[Batch],
    proof: Sequence[Batch],
    *,
    tolerance: float = 0.01,
    parameters: int | None = None,
    shape: Shape | None = None,
    recover: int = 0,
    adapter: str = "default",
    loss: Loss = model_loss,
    outputs: Outputs = model_outputs,
    progress: Progress = lambda words: None,
) -> Fit:
    """How small the LoRA of `model` may be. The model stays as it is; `cut_model` writes the smaller adapter.

    Every size in SHARES is measured on the batches of `choice`, paired batch by batch with the whole adapter. From the
    largest down, the last one is taken before the first whose upper bound (95 %) is beyond `tolerance`. What it costs
    is then measured once more on the batches of `proof`; where they say that it is behind tolerance, the next larger
    size is taken and proved. With `recover` smaller sizes are tried too, one after the other, each measured after its
    steps, down to the first that is not within tolerance.

    Args:
        calibration: batches for gradients, of rows like those the adapter was trained on.
        choice: batches of rows it was not trained on; 30 or more, for a standard error of their mean.
        proof: other such batches.
        tolerance: part of what fine-tuning won (loss of the base model less the adapter's) that may be given up.
        parameters: take the largest size of at most so many parameters instead, whatever it costs.
        shape: what the ranks have to look like.
        recover: steps, of one batch of `calibration` each, that train the cut adapter to say what the whole one says.
            Where they do not lower the upper bound of its cost on the batches of `choice`, the cut stays as it was.
        outputs: what the model says of a batch, for `recover` with a model that gives no logits.

    Raises:
        ValueError: a tolerance outside (0, 1), negative steps, too few batches, a size that cannot be had.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; it is a part of what was won, in (0, 1), e.g. 0.01")
    check_steps(recover)
    for name, batches in (("choice", choice), ("proof", proof)):
        if len(batches) < 2:
            raise ValueError(f"{name} has {len(batches)} batches; a standard error takes two, and 30 make it good")
    shape = shape or Shape()
    progress("calibration")
    seen = list(calibration) if recover else calibration
    measured = calibrate(model, seen, adapter=adapter, loss=loss)
    wanted = None if parameters is None else within(measured, shape, parameters)
    points = sizes(measured, shape)
    if wanted is not None and all(each.ranks != wanted.ranks for each in points):
        points = sorted([*points, wanted], key=lambda each: -each.parameters)

    everything = whole(measured)
    asked, kept_back = (Rows(model, measured, batches, adapter, loss) for batches in (choice, proof))
    with model.disable_adapter():  # type: ignore[operator]
        limit = Tolerance(*asked.cost(everything), tolerance, series=2 if recover else 1, batches=len(choice))
    curve = []
    for index, each in enumerate(points):
        progress(f"size {index + 1} of {len(points)}")
        curve.append(each.with_measured(*((0.0, 0.0) if each.ranks == everything else asked.cost(each.ranks))))

    recovered: dict[int, Factors] = {}  # by parameters

    def recovery(size: Point) -> Point:
        """The same size, measured after recovery."""
        if not recover or size.ranks == everything:
            return size
        progress(f"recovery, {size.parameters:,} parameters")
        cut = cut_factors(model, measured, size.ranks, adapter)
        recovered[size.parameters] = distill(model, cut, list(seen), recover, adapter=adapter, outputs=outputs)
        return size.with_recovered(*asked.cost_of(recovered[size.parameters]))

    def proved(size: Point) -> tuple[float, float]:
        """What this size costs on the rows of the proof, with its standard error."""
        progress("proof")
        if size.gains_by_recovery:
            return kept_back.cost_of(recovered[size.parameters])
        return kept_back.cost(size.ranks)

    if wanted is not None:
        curve = [recovery(each) if each.ranks == wanted.ranks else each for each in curve]
        chosen = next(each for each in curve if each.ranks == wanted.ranks)
        cost = proved(chosen)
    else:
        curve = recovered_curve(curve, limit, recovery) if recover else curve
        chosen, cost = _proved_choice(curve, limit, proved) or (point(measured, everything), (0.0, 0.0))
    is_whole = chosen.ranks == everything
    return Fit(
        calibration=measured,
        curve=curve,
        chosen=chosen,
        tolerance=limit,
        within_tolerance=wanted is None and not is_whole,
        proof=None if is_whole else cost[0],
        proof_standard_error=None if is_whole else cost[1],
        recover_steps=recover,
        factors=recovered[chosen.parameters] if chosen.gains_by_recovery else None,
        verdict=verdict(curve, limit),
        words=in_words(curve, limit, max(layer.rank for layer in measured.layers.values())),
    )


def _proved_choice(
    curve: Sequence[Point], limit: Tolerance, proved: Callable[[Point], tuple[float, float]]
) -> tuple[Point, tuple[float, float]] | None:
    """The smallest size within tolerance that the proof does not contradict, and its proof; None: there is none."""
    left = list(curve)
    while (chosen := smallest_within(left, limit)) is not None:
        cost, error = proved(chosen)
        if cost - limit.errors * error <= limit.loss:
            return chosen, (cost, error)
        left = [each for each in left if each.parameters > chosen.parameters]
    return None


class Rows:
    """Rows on which any size is compared with the whole adapter, batch by batch."""

    def __init__(
        self, model: nn.Module, measured: Calibration, batches: Sequence[Batch], adapter: str, loss: Loss
    ) -> None:
        self._model, self._measured, self._batches, self._adapter, self._loss = model, measured, batches, adapter, loss
        self._weights = [float(num_samples(model, batch)) for batch in batches]
        with truncated(model, measured, whole(measured), adapter):
            self._with_all = self._losses()

    def _losses(self) -> list[float]:
        found = torch.stack([self._loss(self._model, batch).float() for batch in self._batches]).tolist()
        finite = [*map(math.isfinite, found)]
        if not all(finite):
            raise ValueError(f"the loss of batch {finite.index(False)} is not finite; take it out")
        return found

    @property
    def loss(self) -> float:
        """The mean loss of the whole adapter."""
        return paired([0.0] * len(self._with_all), self._with_all, self._weights)[0]

    def cost(self, ranks: Ranks, bases: Calibration | None = None) -> tuple[float, float]:
        """Mean rise of the loss with the first `ranks` directions of these bases, by default those measured, in
        evaluation mode, and its standard error."""
        with truncated(self._model, bases or self._measured, ranks, self._adapter):
            return paired(self._with_all, self._losses(), self._weights)

    def cost_of(self, factors: Factors) -> tuple[float, float]:
        """The same with these factors."""
        with evaluating(self._model), torch.no_grad(), replaced(self._model, factors, self._adapter):
            return paired(self._with_all, self._losses(), self._weights)

"""Fit: the smallest adapter that does the job, cut out of one that is trained, with a proof on rows of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pedyra.fit.calibration import Batch, Loss, calibrate, model_loss, truncated
from pedyra.fit.curve import Point, Shape, point, sizes, whole, within
from pedyra.fit.gramians import Calibration
from pedyra.fit.samples import num_samples
from pedyra.fit.verdict import Tolerance, in_words, paired, smallest_within, verdict

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
        of = whole(self.calibration)
        return {
            "kept": sum(self.ranks.values()),
            "of": sum(of.values()),
            "parameters": self.chosen.parameters,
            "share": self.chosen.share,
            "predicted_cost": self.chosen.predicted.cost,
            "measured_cost": self.proof,
            "standard_error": self.proof_standard_error,
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
                "predicted_cost": each.predicted.cost,
                "measured_cost": each.measured,
                "standard_error": each.standard_error,
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
    adapter: str = "default",
    loss: Loss = model_loss,
    progress: Progress = lambda words: None,
) -> Fit:
    """How small the LoRA of `model` may be. The model stays as it is; `cut_folder` writes the smaller adapter.

    Every size in SHARES is measured on the batches of `choice`, paired batch by batch with the whole adapter, and the
    smallest is taken whose upper bound (95 % over all sizes asked) costs no more than `tolerance`. What it costs is
    then measured once more on the batches of `proof`; where they say that it is behind tolerance, the next larger size
    is taken and proved.

    Args:
        calibration: batches for gradients, of rows like those the adapter was trained on.
        choice: batches of rows it was not trained on; 30 or more, for a standard error of their mean.
        proof: other such batches.
        tolerance: part of what fine-tuning won (loss of the base model less the adapter's) that may be given up.
        parameters: take the largest size of at most so many parameters instead, whatever it costs.
        shape: what the ranks have to look like.

    Raises:
        ValueError: a tolerance outside (0, 1), too few batches, a size that cannot be had.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; it is a part of what was won, in (0, 1), e.g. 0.01")
    for name, batches in (("choice", choice), ("proof", proof)):
        if len(batches) < 2:
            raise ValueError(f"{name} has {len(batches)} batches; a standard error takes two, and 30 make it good")
    shape = shape or Shape()
    progress("calibration")
    measured = calibrate(model, calibration, adapter=adapter, loss=loss)
    wanted = None if parameters is None else within(measured, shape, parameters)
    points = sizes(measured, shape)
    if wanted is not None and all(each.ranks != wanted.ranks for each in points):
        points = sorted([*points, wanted], key=lambda each: -each.parameters)

    weights = [float(num_samples(model, batch)) for batch in choice]
    with_all = losses(model, measured, whole(measured), choice, adapter, loss)
    with model.disable_adapter():  # type: ignore[operator]
        without = losses(model, measured, whole(measured), choice, adapter, loss)
    limit = Tolerance(*paired(with_all, without, weights), tolerance)
    curve = []
    for index, each in enumerate(points):
        progress(f"size {index + 1} of {len(points)}")
        if each.ranks == whole(measured):
            curve.append(each.with_measured(0.0, 0.0))
        else:
            found = losses(model, measured, each.ranks, choice, adapter, loss)
            curve.append(each.with_measured(*paired(with_all, found, weights)))

    progress("proof")
    if wanted is not None:
        chosen = next(each for each in curve if each.ranks == wanted.ranks)
        cost = _proved(model, measured, chosen, proof, adapter, loss)
    else:
        chosen, cost = _proved_choice(model, measured, curve, limit, proof, adapter, loss)
    is_whole = chosen.ranks == whole(measured)
    return Fit(
        calibration=measured,
        curve=curve,
        chosen=chosen,
        tolerance=limit,
        within_tolerance=wanted is None and not is_whole,
        proof=None if is_whole else cost[0],
        proof_standard_error=None if is_whole else cost[1],
        verdict=verdict(curve, limit),
        words=in_words(curve, limit, max(layer.rank for layer in measured.layers.values())),
    )


def _proved_choice(
    model: nn.Module, measured: Calibration, curve: Sequence[Point], limit: Tolerance, proof: Sequence[Batch],
    adapter: str, loss: Loss,
) -> tuple[Point, tuple[float, float]]:  # fmt: skip
    """The smallest size within tolerance that the proof does not contradict, and its cost there."""
    left = list(curve)
    while (chosen := smallest_within(left, limit)) is not None:
        cost, error = _proved(model, measured, chosen, proof, adapter, loss)
        if cost - 1.645 * error <= limit.loss:  # one-sided 95 %
            return chosen, (cost, error)
        left = [each for each in left if each.parameters > chosen.parameters]
    return point(measured, whole(measured)).with_measured(0.0, 0.0), (0.0, 0.0)


def _proved(
    model: nn.Module, measured: Calibration, chosen: Point, proof: Sequence[Batch], adapter: str, loss: Loss
) -> tuple[float, float]:
    weights = [float(num_samples(model, batch)) for batch in proof]
    with_all = losses(model, measured, whole(measured), proof, adapter, loss)
    return paired(with_all, losses(model, measured, chosen.ranks, proof, adapter, loss), weights)


def losses(
    model: nn.Module, measured: Calibration, ranks: dict[str, int], batches: Sequence[Batch], adapter: str, loss: Loss
) -> list[float]:
    """The loss of each batch with these ranks, in evaluation mode.

    Raises:
        ValueError: a loss that is not finite with the whole adapter.
    """
    with truncated(model, measured, ranks, adapter):
        found = torch.stack([loss(model, batch).float() for batch in batches]).tolist()
    if not all(map(math.isfinite, found)):
        raise ValueError(f"the loss of batch {[*map(math.isfinite, found)].index(False)} is not finite; take it out")
    return found

"""What noise does to gains that a few steps measured: their errors, and how large the largest of many is by chance."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PATTERNS = 2048
"""Sign patterns that are looked at: all of them up to 11 steps, so many drawn at random beyond."""

CHUNK = 4_000_000
"""Elements that are held at a time."""


def means_and_errors(
    values: Float[Tensor, "steps directions"], layer_of: Int[Tensor, " directions"]
) -> tuple[Float[Tensor, " directions"], Float[Tensor, " directions"]]:
    """Per direction the mean over the steps, and its standard error: at least that of all its layer's directions.

    A handful of steps knows its own spread badly, and the direction that looks best is the one whose spread looks small
    by chance.
    """
    mean = values.mean(0)
    return mean, _errors(mean[None], values, _averaging(layer_of, values.dtype))[0]


def chance(
    values: Float[Tensor, "steps directions"],
    layer_of: Int[Tensor, " directions"],
    among: Bool[Tensor, " directions"],
    certainty: float,
) -> float:
    """Errors that noise alone lets the largest mean reach as seldom as one normal value lies beyond +-`certainty`.

    The largest of many is large by chance: of 1600 directions two lie beyond 3 errors. Where no direction gains
    anything, the signs of a whole step are as likely the other way round, so every pattern of signs of the steps shows
    what chance could have given, with the spread of these values and all that their directions share (a randomisation
    test of the largest: Fisher 1935; Westfall and Young 1993). The pattern that was seen is one of them.

    Args:
        layer_of: number of each direction's layer.
        among: the directions of which the largest is asked for; the others only tell their layer's error.

    Returns:
        Never below `certainty`. With fewer than `fewest_steps(certainty)` no mean is above it.
    """
    steps, directions = values.shape
    level, patterns = _level(certainty), _patterns(steps).to(values)
    averaging = _averaging(layer_of, values.dtype)
    largest = []
    for signs in patterns.split(max(1, CHUNK // directions)):
        means = signs @ values / steps
        errors = _errors(means, values, averaging)
        # No spread at all is no gain where there is no gradient, and a sure one elsewhere.
        ratios = (means / errors).nan_to_num(0.0, math.inf, -math.inf)[:, among]
        largest += [ratios.amax(1), -ratios.amin(1)]  # of these signs, and of all of them the other way round
    ordered = torch.cat(largest).sort(descending=True).values
    beyond = int(level * len(ordered))
    return max(certainty, float(ordered[beyond])) if beyond < len(ordered) else certainty


def fewest_steps(certainty: float) -> int:
    """With fewer steps all patterns of signs together are too few to be that certain; 9 for 3 errors."""
    level = _level(certainty)
    return max(2, math.floor(-math.log2(level)) + 1) if level > 0 else 1 << 31


def _level(certainty: float) -> float:
    """The part of normal values beyond +-`certainty`."""
    return math.erfc(certainty / math.sqrt(2))


def _patterns(steps: int) -> Float[Tensor, "patterns steps"]:
    """+1 and -1; half of the patterns, the others are these times -1. The first, +1 throughout, is what was seen."""
    if 2**steps <= PATTERNS:
        bits = torch.arange(2 ** (steps - 1))[:, None] >> torch.arange(steps) & 1
    else:
        bits = torch.randint(2, (PATTERNS // 2, steps), generator=torch.Generator().manual_seed(0))
        bits[0] = 0
    return 1.0 - 2.0 * bits


def _averaging(layer_of: Int[Tensor, " directions"], dtype: torch.dtype) -> Float[Tensor, "directions layers"]:
    """Times this, a row of values by direction is their mean by layer."""
    member = torch.eye(int(layer_of.max()) + 1, dtype=dtype, device=layer_of.device)[layer_of]
    return member / member.sum(0).clamp_min(1)


def _errors(
    means: Float[Tensor, "patterns directions"],
    values: Float[Tensor, "steps directions"],
    averaging: Float[Tensor, "directions layers"],
) -> Float[Tensor, "patterns directions"]:
    """Standard errors of means of these values, whatever their signs."""
    steps = len(values)
    variance = (values.square().mean(0) - means.square()).clamp_min(0) * (steps / (steps - 1))
    of_layer = variance @ averaging @ (averaging > 0).to(averaging).T
    return (torch.maximum(variance, of_layer) / steps).sqrt()

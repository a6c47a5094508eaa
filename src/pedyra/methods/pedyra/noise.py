"""What noise does to gains that a few steps measured: their errors, and how large the largest of many is by chance."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PATTERNS = 2048, 1 << 17
"""At most how many sign patterns are looked at, (least, most): all there are if that is no more, else as many as the
certainty asks for within this range."""

RARE = 8
"""How many of the patterns that are drawn may exceed the bound: the fewer, the more it depends on the draw."""

CHUNK = 100_000
"""Elements that are held at a time: few enough to stay in the cache."""


def means_and_errors(
    values: Float[Tensor, "steps directions"], layer_of: Int[Tensor, " directions"]
) -> tuple[Float[Tensor, " directions"], Float[Tensor, " directions"]]:
    """Per direction the mean over the steps, and its standard error: at least that of all its layer's directions.

    A handful of steps knows its own spread badly, and the direction that looks best is the one whose spread looks small
    by chance.
    """
    mean, layers = values.mean(0), int(layer_of.max()) + 1
    variance = _variance(mean, values.square().mean(0), len(values))
    of_layer = variance.new_zeros(layers).index_add(0, layer_of, variance) / layer_of.bincount(minlength=layers)
    return mean, (torch.maximum(variance, of_layer[layer_of]) / len(values)).sqrt()


def chance(
    values: Float[Tensor, "steps directions"],
    layer_of: Int[Tensor, " directions"],
    among: Bool[Tensor, " directions"],
    certainty: float,
) -> float:
    """The bound, in standard errors, that the largest mean passes by chance as rarely as a normal value +-`certainty`.

    The largest of many is large by chance: of 1600 directions two lie beyond 3 errors. Where no direction gains
    anything, the signs of a whole step are as likely the other way round, so every pattern of signs of the steps shows
    what chance could have given, with the spread of these values and all that their directions share (a randomisation
    test of the largest: Fisher 1935; Westfall and Young 1993). The pattern that was seen is one of them.

    The search stops early (Besag and Clifford 1991) once so many patterns exceed what was seen that the rest cannot
    bring the bound below it, so that nothing can be beyond it; the bound returned is then that of the patterns so far.
    At least `CHUNK` elements of them are looked at.

    Args:
        layer_of: number of each direction's layer.
        among: the directions of which the largest is asked for; the others only tell their layer's error.

    Returns:
        Never below `certainty`; infinite with fewer than `fewest_steps(certainty)`.
    """
    steps = len(values)
    if steps < fewest_steps(certainty):
        return math.inf
    # On the host, in double precision: the same bound on every device, whatever products are shortened there. A layer
    # whose weights are no numbers any more has no gain.
    values = values.double().cpu().nan_to_num(0.0, 0.0, 0.0).T.contiguous()
    layer_of, among = layer_of.cpu(), among.cpu()
    level, squares = _level(certainty), values.square().mean(1, keepdim=True)
    directions = layer_of.bincount()[:, None].clamp_min(1)
    patterns, largest = _patterns(steps, level), []
    allowed, exceeding = int(level * 2 * len(patterns)), 0
    for signs in patterns.split(max(1, CHUNK // len(values))):
        means = values @ signs.T / steps
        variance = _variance(means, squares, steps)
        of_layer = variance.new_zeros(len(directions), len(signs)).index_add_(0, layer_of, variance) / directions
        errors = torch.maximum(variance, of_layer.index_select(0, layer_of)).div_(steps).sqrt_()
        # No spread at all is no gain where there is no gradient, and a sure one elsewhere.
        ratios = means.div_(errors).nan_to_num_(0.0, math.inf, -math.inf)[among]
        largest += [ratios.amax(0), -ratios.amin(0)]  # of these signs, and of all of them the other way round
        exceeding += int((torch.cat(largest[-2:]) > largest[0][0]).sum())
        if exceeding > allowed:
            break
    ordered = torch.cat(largest).sort(descending=True).values
    beyond = int(level * len(ordered))
    return max(certainty, float(ordered[beyond])) if beyond < len(ordered) else certainty


def fewest_steps(certainty: float) -> int | float:
    """With fewer steps all patterns of signs are too few to be that certain: 9 for 3 errors. Infinite above 4."""
    level = _level(certainty)
    if level * PATTERNS[1] < RARE:
        return math.inf
    return max(2, math.floor(-math.log2(level)) + 1)


def _level(certainty: float) -> float:
    """The part of normal values beyond +-`certainty`."""
    return math.erfc(certainty / math.sqrt(2))


def _patterns(steps: int, level: float) -> Float[Tensor, "patterns steps"]:
    """+1 and -1 in random order; half of the patterns, the others are these times -1. The first, +1 throughout, is what
    was seen."""
    count = min(PATTERNS[1], max(PATTERNS[0], math.ceil(RARE / level)))
    generator = torch.Generator().manual_seed(0)
    if 2**steps <= count:
        others = 1 + torch.randperm(2 ** (steps - 1) - 1, generator=generator)
        bits = torch.cat([others.new_zeros(1), others])[:, None] >> torch.arange(steps) & 1
    else:
        bits = torch.randint(2, (count // 2, steps), generator=generator)
        bits[0] = 0
    return 1.0 - 2.0 * bits.double()


def _variance(means: Float[Tensor, "*#any"], squares: Float[Tensor, "*#any"], steps: int) -> Float[Tensor, "*#any"]:
    """Sample variance of `steps` values with these means and mean squares."""
    return (squares - means.square()).clamp_min_(0).mul_(steps / (steps - 1))

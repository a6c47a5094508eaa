"""When ranks move: the steps of the adjustments (t_i, Delta_T, t_f)."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The adjustments of one run, in optimizer steps; step 1 is the first one. All fields are resolved integers.

    An adjustment follows step t when t > t_i, (t - t_i) % interval == 0 and t < T - t_f.
    """

    total_steps: int
    initial_warmup: int
    interval: int
    final_warmup: int
    adjustments: tuple[int, ...] = field(init=False)
    """The steps after which ranks are adjusted, ascending."""

    def __post_init__(self) -> None:
        first = self.initial_warmup + self.interval
        steps = tuple(range(first, self.total_steps - self.final_warmup, self.interval))
        object.__setattr__(self, "adjustments", steps)

    def is_adjustment(self, step: int) -> bool:
        """Whether ranks are adjusted after this step."""
        return self.next_adjustment(step) == step

    def next_adjustment(self, step: int) -> int | None:
        """The first adjustment at or after this step; None when there is none left."""
        index = bisect_left(self.adjustments, step)
        return self.adjustments[index] if index < len(self.adjustments) else None


def resolve_schedule(
    total_steps: int,
    *,
    initial_warmup: int | float,
    interval: int | float,
    final_warmup: int | float,
    least_interval: int = 1,
) -> Schedule:
    """The schedule of a run of `total_steps`; floats are fractions of it.

    An interval that is a fraction has at least `least_interval` steps.

    Raises:
        ValueError: a run of no step, two warm-ups that leave no room, no adjustment between them, or an interval, given
            in steps, below the least.
    """

    def steps(value: int | float) -> int:
        return round(value * total_steps) if isinstance(value, float) else value

    if isinstance(interval, int) and interval < least_interval:
        raise ValueError(
            f"rank.interval is {interval}, but what is measured between two adjustments takes {least_interval} or "
            f"more; raise it, or use method pedyra-paper"
        )
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}; a run has at least one optimizer step")
    if isinstance(interval, float):
        interval = max(least_interval, steps(interval))
    resolved = Schedule(
        total_steps=total_steps,
        initial_warmup=steps(initial_warmup),
        interval=interval,
        final_warmup=steps(final_warmup),
    )
    if resolved.initial_warmup + resolved.final_warmup >= total_steps:
        raise ValueError(
            f"rank.initial_warmup ({resolved.initial_warmup}) and rank.final_warmup ({resolved.final_warmup}) together "
            f"fill the run of {total_steps} steps; shorten them, or train longer"
        )
    if not resolved.adjustments:
        repair = "lower the interval or the warm-ups" if interval > least_interval else "train longer"
        raise ValueError(
            f"the schedule has no adjustment: with rank.interval {resolved.interval} the first would follow step "
            f"{resolved.initial_warmup + resolved.interval}, the last must come before step "
            f"{total_steps - resolved.final_warmup} of {total_steps}; {repair}"
        )
    return resolved


def ema_window(beta: float, tolerance: float = 1e-6) -> int:
    """Steps W after which an EMA with `beta`, and an EMA of its deviations, have forgotten all before to `tolerance`.

    Sensitivity forgets as beta^W. The uncertainty of Eq. (3) follows the sensitivity's own start-up error, which
    adds a factor 1 + W (1 - beta). For 0.85 and 1e-6 this gives 103 steps.
    """
    if beta == 0:
        return 1
    window = math.ceil(math.log(tolerance) / math.log(beta))
    while (1 + window * (1 - beta)) * beta**window > tolerance:
        window += 1
    return window

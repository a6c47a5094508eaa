"""The schedule says when ranks move: the steps of the adjustments (t_i, Delta_T, t_f)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pedyra.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The adjustments of one run follow step t, of which 1 is the first, when t > t_i, (t - t_i) % interval == 0 and
    t < T - t_f."""

    total_steps: int
    initial_warmup: int
    interval: int
    final_warmup: int

    @property
    def adjustments(self) -> range:
        """Return the steps after which ranks are adjusted, ascending."""
        return range(self.initial_warmup + self.interval, self.total_steps - self.final_warmup, self.interval)

    def next_adjustment(self, step: int) -> int | None:
        """Find the first adjustment at or after this step; None when there is none left."""
        steps = self.adjustments
        later = steps[max(0, -((steps.start - step) // steps.step)) :]
        return later[0] if later else None


def resolve_schedule(
    total_steps: int,
    *,
    initial_warmup: int | float,
    interval: int | float,
    final_warmup: int | float,
    least_interval: int = 1,
) -> Schedule:
    """Make the schedule of a run of `total_steps`; floats are fractions of it, and such an interval has at least
    `least_interval` steps. Raises ValueError: no step, no adjustment, or an interval, in steps, below the least."""
    if isinstance(interval, int) and interval < least_interval:
        raise UserError(
            f"interval is {interval}, but fewer than {least_interval} steps between two adjustments tell this method "
            f"nothing; raise it"
        )
    if total_steps < 1:
        raise UserError(f"total_steps is {total_steps}; a run has at least one optimizer step")

    def steps(value: int | float) -> int:
        return round(value * total_steps) if isinstance(value, float) else value

    resolved = Schedule(
        total_steps=total_steps,
        initial_warmup=steps(initial_warmup),
        interval=max(least_interval, steps(interval)),
        final_warmup=steps(final_warmup),
    )
    if not resolved.adjustments:
        raise UserError(
            f"no rank could ever move: the first adjustment would follow step "
            f"{resolved.initial_warmup + resolved.interval} (initial_warmup {resolved.initial_warmup}, interval "
            f"{resolved.interval}), but none follows in the last {resolved.final_warmup} steps (final_warmup) of a run "
            f"of {total_steps}; shorten them, or train for longer"
        )
    return resolved


def check_steps(name: str, value: Any, least: int = 0) -> None:
    """Raise ValueError unless the value is steps of a run, `least` or more, or a fraction of it, a float below 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{name} is {value!r}; give steps as an integer or a fraction of the run")
    if isinstance(value, float) and not 0 <= value < 1:
        raise UserError(f"{name} is {value}; a float is a fraction of the run in [0, 1), steps are integers")
    if value < 0 or (least and value == 0):
        raise UserError(f"{name} is {value}; it must be {'positive' if least else '0 or more'}")


def check_fields(settings: Any) -> None:
    """Check the fields that every method on a schedule has: when ranks move, seed, and how triples are scored."""
    for name in ("interval", "initial_warmup", "final_warmup"):
        check_steps(name, getattr(settings, name), least=1 if name == "interval" else 0)
    for name in ("min_rank", "seed"):
        check_count(name, getattr(settings, name), 0)
    for name in ("beta1", "beta2"):
        check_number(name, getattr(settings, name), least=0, below=1)
    check_number("orth_weight", settings.orth_weight, least=0)


def check_count(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless the value is an integer of at least so much."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {value!r}; it must be an integer of at least {least}")


def check_word(name: str, value: Any, words: Sequence[str]) -> None:
    """Raise ValueError unless the value is one of these words."""
    if value not in words:
        raise UserError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, words))}")


def check_number(name: str, value: Any, least: int | float = -math.inf, below: int | float = math.inf) -> None:
    """Raise ValueError unless the value is a finite number of at least `least`, and below `below`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{name} is {value!r}; it must be a finite number")
    if value < least or value >= below:
        most = "" if below == math.inf else f" and below {below:g}"
        raise UserError(f"{name} is {value!r}; it must be at least {least:g}{most}")

"""What a bench may vary of our default method; users have no reason to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pedyra.config import check_count, check_steps


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`method_settings` of method pedyra. The ablations of docs/results.md change one of them each.

    Raises:
        ValueError: a value outside its range, with the value, the rule and the repair.
    """

    reassignment: int | float | None = None
    """Step at whose nearest adjustment all ranks are assigned anew, once, in proportion to what each layer's triples
    save of the loss per parameter, by Adam's second moments; a float below 1 is a fraction of the run, 0: never. None:
    0.1, or never with an optimizer outside Adam's family."""
    certainty: float = 3.0
    """How many standard errors of a new triple's gain count as noise: it is credited with its square less theirs,
    gain^2 - (certainty error)^2. No gain counts that is not larger than chance shows among all candidates
    (`noise.chance`) as seldom as a normal value is beyond this many errors; above 4 no measurement is that sure."""
    margin: float = 0.25
    """At first, a swap takes a sure gain above the square of this part of what the triples that it replaces are worth;
    the part rises to 1 over the window. Below 1, because in a network out of balance a triple in the wrong layer does a
    substitute's work, and no single move may look worth making: with 1 from the start two of four block runs stay
    stuck."""
    patience: int = 4
    """Adjustments in a row without a move after which ranks stay as they are and nothing is observed any more; 0: go on
    to the end of the window; those before the reassignment do not count. No effect on planted ranks, and a run that
    settles costs what LoRA does."""
    sketch_steps: int = 100
    """Optimizer steps before an adjustment, at most the whole interval, in which gradient directions are sketched. The
    noise of what is measured falls with their root: with 21 nothing is ever sure enough to move."""
    sketch_size: int = 8
    """Candidate directions per layer and adjustment; 4 find the same ranks."""

    def __post_init__(self) -> None:
        if self.reassignment is not None:
            check_steps("method_settings.reassignment", self.reassignment)
        for name, least in (("certainty", "0 or more"), ("margin", "above 0")):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (name == "margin" and value == 0):
                raise ValueError(f"method_settings.{name} is {value!r}; it must be a finite number, {least}")
        for name, count in (("patience", 0), ("sketch_steps", 4), ("sketch_size", 1)):
            check_count(f"method_settings.{name}", getattr(self, name), count)

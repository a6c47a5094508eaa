"""What a fit can be asked, once: Python, the command line, recipes and axolotl are made from these fields."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pedyra.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of a fit.

    Raises:
        UserError: a value outside its range.
    """

    __pydantic_config__ = {"use_attribute_docstrings": True, "extra": "forbid"}  # for recipes and the command line

    tolerance: float | str = 0.01
    """What may be given up: a part of what fine-tuning won (the loss of the base model less the adapter's), as 0.01 or
    "1%", or points of the accuracy, as "0.5pt"."""
    rank: int | None = None
    """Take this rank in every layer, whatever it does, and say what it does."""
    rows: int = 1024
    """So many held-out rows prove at most, and as many rows calibrate."""
    curve: bool = False
    """Measure the sizes below the first that is not within tolerance too."""

    def __post_init__(self) -> None:
        value = self._value()
        if self.points is None:
            object.__setattr__(self, "tolerance", value)
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank is {self.rank}; a rank is at least 1")
        if self.rows < 32:
            raise UserError(f"rows is {self.rows}; a fit takes at least 32")

    @property
    def part(self) -> float:
        """Of what was won; 1 % where the tolerance is in points."""
        return 0.01 if self.points is not None else self._value()

    @property
    def points(self) -> float | None:
        """By how much the accuracy may fall, where that was asked: 0.005 is half a point."""
        return self._value() if isinstance(self.tolerance, str) and self.tolerance.strip().endswith("pt") else None

    def _value(self) -> float:
        """The tolerance as a number in (0, 1)."""
        given: Any = self.tolerance
        text = given.strip() if isinstance(given, str) else given
        try:
            for unit in ("%", "pt"):
                if isinstance(text, str) and text.endswith(unit):
                    found = float(text.removesuffix(unit)) / 100
                    break
            else:
                found = float(text)
        except (TypeError, ValueError):
            found = math.nan
        if not 0 < found < 1:
            raise UserError(
                f"tolerance is {given!r}; it is a part of what was won, in (0, 1), such as 0.01 or 1%, or points of "
                f"the accuracy, such as 0.5pt"
            )
        return found

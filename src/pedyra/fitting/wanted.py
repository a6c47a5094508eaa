"""A fit can be asked this: Python, the command line, recipes and axolotl are made from these fields."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pedyra.errors import UserError


def amount(given: Any) -> tuple[float, str]:
    """Read a number and its unit: "1%" is 0.01 of "%", "0.5pt" 0.005 of "pt", and 0.01 itself of "". What is no number
    is NaN."""
    text = str(given).strip()
    unit = next((unit for unit in ("%", "pt") if text.endswith(unit)), "")
    try:
        return float(text.removesuffix(unit)) / (100 if unit else 1), unit
    except ValueError:
        return math.nan, unit


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A user asks this of a fit. A tolerance that is a number and no text, 0.01, is a part of what was won.

    Raises:
        UserError: a value outside its range.
    """

    __pydantic_config__ = {"use_attribute_docstrings": True, "extra": "forbid"}  # for recipes and the command line

    tolerance: float | str = "1%"
    """What may be given up: a part of what fine-tuning won (the loss of the base model less the adapter's), as 1%, or
    points of the accuracy, as 0.5pt."""
    rank: int | None = None
    """Take this rank in every layer, whatever it does, and say what it does."""
    rows: int = 1024
    """The proof takes this number of held-out rows at most, and the calibration as many rows."""
    curve: bool = False
    """Measure the sizes below the first that is not within tolerance too."""

    def __post_init__(self) -> None:
        value, unit = amount(self.tolerance)
        if not 0 < value < 1 or (isinstance(self.tolerance, str) and not unit):  # as text it might be the loss itself
            raise UserError(
                f"tolerance is {self.tolerance!r}; it is a part of what was won, above 0% and below 100%, such as 1%, "
                f"or points of the accuracy, such as 0.5pt"
            )
        if unit != "pt":
            object.__setattr__(self, "tolerance", value)
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank is {self.rank}; a rank is at least 1")
        if self.rows < 32:
            raise UserError(f"rows is {self.rows}; a fit takes at least 32")

    @property
    def part(self) -> float:
        """Return the part of what was won that may be given up; 1 % where the tolerance is in points."""
        return 0.01 if self.points is not None else amount(self.tolerance)[0]

    @property
    def points(self) -> float | None:
        """Return by how much the accuracy may fall, where that was asked: 0.005 is half a point."""
        value, unit = amount(self.tolerance)
        return value if unit == "pt" else None

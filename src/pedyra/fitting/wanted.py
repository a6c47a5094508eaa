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

    tolerance: float | str | None = None
    """What may be given up: a part of what fine-tuning won (the loss of the base model less the adapter's), as 1%, or
    points of the accuracy, as 0.5pt. Default: 1pt for a classifier, 1% for others."""
    changed: float | str | None = None
    """This share of the answers (classes of rows, next tokens) may be others than the whole adapter's, as 2%: it needs
    no labels, and the accuracy falls by no more. Default for rows without labels: 2%."""
    rank: int | None = None
    """Take this rank in every layer, whatever it does, and say what it does."""
    rows: int | None = None
    """The proof takes this number of held-out rows at most, and the calibration as many rows. Default: 1,024 calibrate,
    and as many prove as one model answers in the time of the calibration."""
    curve: bool = False
    """Measure the sizes below the first that is not within tolerance too."""

    def __post_init__(self) -> None:
        if self.tolerance is not None and self.changed is not None:
            raise UserError(
                f"tolerance is {self.tolerance} and changed is {self.changed}; one of them is held at a time, so leave "
                f"out the other, and ask the result for it: .at(changed=...)"
            )
        self._check(
            "tolerance",
            ("%", "pt"),
            "a part of what was won, above 0% and below 100%, such as 1%, or points of the accuracy, such as 0.5pt",
        )
        self._check("changed", ("%",), "a share of the answers, above 0% and below 100%, such as 2%")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank is {self.rank}; a rank is at least 1")
        if self.rows is not None and self.rows < 32:
            raise UserError(f"rows is {self.rows}; a fit takes at least 32")

    def _check(self, name: str, units: tuple[str, ...], rule: str) -> None:
        """Read a share, and refuse what is none: ValueError."""
        given = getattr(self, name)
        if given is None:
            return
        value, unit = amount(given)
        if not 0 < value < 1 or (isinstance(given, str) and unit not in units):  # as text it might be the loss itself
            raise UserError(f"{name} is {given!r}; it is {rule}")
        if unit != "pt":
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        """Write the tolerance as it is asked; empty where none is."""
        given = self.changed if self.tolerance is None else self.tolerance
        return f"{100 * given:.3g}%" if isinstance(given, float) else str(given or "")

    @property
    def says_how(self) -> bool:
        """Tell whether the user says what may be given up."""
        return self.tolerance is not None or self.changed is not None

    @property
    def part(self) -> float:
        """Return the part of what was won that may be given up, where it decides; else 1 %."""
        return self.tolerance if isinstance(self.tolerance, float) else 0.01

    @property
    def points(self) -> float | None:
        """Return by how much the accuracy may fall, where that was asked: 0.005 is half a point."""
        return amount(self.tolerance)[0] if isinstance(self.tolerance, str) else None

    @property
    def share(self) -> float | None:
        """Return which share of the answers may change, where that was asked."""
        return self.changed if isinstance(self.changed, float) else None

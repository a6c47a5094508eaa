"""What a fit can be asked: Python, the command line, recipes and axolotl are made from these fields."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from pedyra.errors import UserError

AMOUNT = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(\S+)")


def amount(text: Any) -> tuple[float, str]:
    """Read a number and its unit: "1%" is 0.01 of "%", "0.5pt" 0.005 of "pt", and "0.1 loss" 0.1 of "loss". Without a
    number or a unit it is NaN."""
    match = AMOUNT.fullmatch(str(text).strip())
    if match is None:
        return math.nan, ""
    return float(match[1]) / (100 if match[2] in ("%", "pt") else 1), match[2]


@dataclass(frozen=True, kw_only=True)
class FitRequest:
    """What a user asks of a fit.

    Raises:
        UserError: a value outside its range, or a number without its unit.
    """

    __pydantic_config__ = {"use_attribute_docstrings": True, "extra": "forbid", "coerce_numbers_to_str": True}
    """It is for recipes and the command line; a number without a unit is then refused in our words."""

    tolerance: str | None = None
    """What may be given up: a part of the gain (the loss of the base model less the adapter's), as 1%, or points of the
    accuracy, as 0.5pt. Default: 1pt for a classifier, 1% for others."""
    changed: str | None = None
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
        _check(
            "tolerance",
            self.tolerance,
            ("%", "pt"),
            "a part of the gain over the base model, above 0% and below 100%, such as 1%, or points of the accuracy, "
            "such as 0.5pt",
        )
        check_changed(self.changed)
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank is {self.rank}; a rank is at least 1")
        if self.rows is not None and self.rows < 32:
            raise UserError(f"rows is {self.rows}; a fit takes at least 32")

    def __str__(self) -> str:
        """Write the tolerance as the user did; empty where there is none."""
        return self.tolerance or self.changed or ""

    @property
    def limit(self) -> tuple[float, str]:
        """Return what may be given up, and of what: 0.01 of the "gain" (the default), of the "accuracy"
        (a point) or of the "answers"."""
        value, unit = amount(self.changed or self.tolerance or "1%")
        return value, "answers" if self.changed is not None else "accuracy" if unit == "pt" else "gain"


def check_changed(changed: Any) -> None:
    """Refuse what is no share of the answers: ValueError."""
    _check("changed", changed, ("%",), "a share of the answers, above 0% and below 100%, such as 2%")


def _check(name: str, text: Any, units: tuple[str, ...], rule: str) -> None:
    value, unit = amount(text)
    if text is not None and not (0 < value < 1 and unit in units):
        raise UserError(f"{name} is {text!r}; it is {rule}")

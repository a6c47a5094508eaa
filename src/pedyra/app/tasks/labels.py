"""Labels of a data set as the numbers a head is trained on, or a clear error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pedyra.app.recipe_sections import MOST_CLASSES, DataSection
from pedyra.app.tasks.split import Rows


@dataclass(frozen=True)
class Labels:
    """What the labels of a task may be."""

    count: int
    """Outputs of the head: the number of classes, or 1 for a regression."""
    names: tuple[str, ...] | None = None
    """Class names in the order of their numbers; None where the data holds numbers without names."""
    named: bool = False
    """The names are numbers that the user gave, so a number in the data is one of them, and no class number."""
    found: bool = False
    """The names are what the training rows hold, as text, so any other value is none of them."""
    real: bool = False
    """Labels are real numbers (regression), not classes."""

    def number(self, value: Any) -> int | float:
        """The label as the head's target. Raises ValueError for what is no label of this task."""
        if self.real:
            return _real(value)
        if self.names is not None and (self.found or isinstance(value, str)):
            if str(value) in self.names:  # a name first: "1" may be the name of class 0
                return self.names.index(str(value))
            if self.found or _integer(value) is None:
                raise ValueError(f"label {value!r} is none of the classes {', '.join(self.names)}; see data.labels")
        number = _integer(value)
        if self.names is not None and self.named and str(number) in self.names:
            return self.names.index(str(number))
        if number is None:
            raise ValueError(
                f"label {value!r} is no class number; give names in data.labels or set data.kind regression"
            )
        if not 0 <= number < self.count:
            raise ValueError(
                f"label {value!r} is out of range: the classes are 0 to {self.count - 1}; "
                "correct the rows, data.label or data.num_labels"
            )
        return number


def known_labels(train: Rows, data: DataSection, class_names: list[str] | None) -> Labels:
    """The labels that `data` or the source declares; where neither does, those of the training rows."""
    if data.kind == "regression":
        return Labels(count=1, real=True)
    names = data.labels or class_names
    values = [row[data.label] for row in train]
    for number, value in enumerate(values, start=1):
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"training row {number} has no label (column {data.label!r}); remove the row or fill it")
    found = names is None and any(isinstance(value, str) and _integer(value) is None for value in values)
    if found:
        names = sorted({str(value) for value in values})
    if names is not None:
        if data.num_labels not in (None, len(names)):
            raise ValueError(
                f"data.num_labels is {data.num_labels}, but there are {len(names)} classes: {', '.join(names)}"
            )
        named = data.labels is not None and all(_integer(name) is not None for name in names)
        return _checked(Labels(count=len(names), names=tuple(names), named=named, found=found), data)
    numbers = [number for value in values if (number := _integer(value)) is not None]
    highest = max(numbers, default=0)
    if highest >= MOST_CLASSES:
        raise ValueError(
            f"column {data.label!r} holds {highest}, which is no class number (0 to {MOST_CLASSES - 1}); give another "
            f"data.label, names in data.labels, or data.kind regression"
        )
    absent = sorted(set(range(highest + 1)) - set(numbers))
    if data.num_labels is None and numbers and absent:
        raise ValueError(
            f"column {data.label!r} has class numbers up to {highest}, but none is {absent[0]}; classes are counted "
            f"from 0: give data.num_labels if some are rare, or data.labels with their names"
        )
    return _checked(Labels(count=data.num_labels or highest + 1), data)


def _checked(labels: Labels, data: DataSection) -> Labels:
    if labels.count < 2:
        raise ValueError(
            f"the training rows hold a single class of column {data.label!r}; a {data.kind} needs two or more: give "
            f"other rows, or data.num_labels"
        )
    return labels


def _integer(value: Any) -> int | None:
    """A class number, also written as text (CSV) or as a float without a fraction; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def _real(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"label {value!r} is no finite number; data.kind regression needs one in every row")
    return number

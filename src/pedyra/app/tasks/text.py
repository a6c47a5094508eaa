"""Rows have one or two texts and a label (classification, pairs, regression); they become tokens and a number."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from pedyra.app.recipe_sections import DataSection
from pedyra.app.tasks.sources import Rows
from pedyra.app.tasks.tokens import num_cut, tell_cut
from pedyra.errors import UserError


@dataclass(frozen=True)
class Labels:
    """The classes of a task by name and by number."""

    names: tuple[str, ...] = ()  # in the order of their numbers; a regression has none
    numbers: Mapping[str, int] = field(default_factory=dict)  # label as text -> number of its class

    @property
    def count(self) -> int:
        """How many outputs the head has."""
        return len(self.names) or 1

    def number(self, value: Any) -> int | float:
        """Return the label as the head's target."""
        if not self.names:
            return _real(value)
        result = self.numbers.get(_as_text(value))
        if result is None:
            raise UserError(
                f"label {value!r} is none of the classes {', '.join(self.names):.200}; correct the rows, data.labels "
                f"or data.num_labels, or set data.kind regression"
            )
        return result


def known_labels(train: Rows, data: DataSection, class_names: list[str] | None) -> Labels:
    """Return the labels that `data` or the source declares, else those of the training rows."""
    if data.kind == "regression":
        return Labels()
    if data.label is None:
        names = data.labels or [str(number) for number in range(data.num_labels or 0)]
        return Labels(tuple(names))
    values = [row[data.label] for row in train]
    for number, value in enumerate(values, start=1):
        if isinstance(value, str) and not value.strip():
            raise UserError(f"training row {number} has no label (column {data.label!r}); remove the row or fill it")
    # A source whose class names are "1" and "2" has the numbers 0 and 1 in its rows.
    declared = None if class_names is None or _has_numbers(class_names) else class_names
    if names := data.labels or declared:
        numbered = not _has_numbers(names)  # else a number in the data is a name
    elif any(isinstance(value, str) and class_number(value) is None for value in values):
        names, numbered = sorted({_as_text(value) for value in values}), False
    else:
        count = data.num_labels or len(class_names or ()) or _count(values, data)
        names, numbered = [str(number) for number in range(count)], True
    if data.num_labels not in (None, len(names)):
        raise UserError(f"data.num_labels is {data.num_labels}, but there are {len(names)} classes: {', '.join(names)}")
    if len(names) < 2:
        raise UserError(
            f"the training rows hold a single class of column {data.label!r}; a {data.kind} needs two or more: give "
            f"other rows, or data.num_labels"
        )
    by_name = {_as_text(name): number for number, name in enumerate(names)}
    by_number = {str(number): number for number in range(len(names))} if numbered else {}
    return Labels(tuple(names), {**by_number, **by_name})


def _count(values: list[Any], data: DataSection) -> int:
    """Count the classes of labels that are class numbers, which begin at 0 and leave none out."""
    numbers = {number for value in values if (number := class_number(value)) is not None}
    highest, absent = max(numbers, default=0), next(number for number in itertools.count() if number not in numbers)
    if numbers and absent < highest:
        raise UserError(
            f"column {data.label!r} has class numbers up to {highest}, but none is {absent}; classes are counted from "
            f"0: give data.num_labels if some are rare, names in data.labels, or data.kind regression"
        )
    return highest + 1


def class_number(value: Any) -> int | None:
    """Read a class number, also written as text (CSV) or as a float without a fraction; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def _has_numbers(names: Sequence[str]) -> bool:
    return any(class_number(name) is not None for name in names)


def _as_text(value: Any) -> str:
    """Write a label as text; 1, 1.0 and "1.0" have the same."""
    number = class_number(value)
    return str(value if number is None else number)


def _real(value: Any) -> float:
    with suppress(TypeError, ValueError):
        if math.isfinite(number := float(value)):
            return number
    raise UserError(f"label {value!r} is no finite number; data.kind regression needs one in every row")


def encode(
    rows: Rows, data: DataSection, tokenizer: PreTrainedTokenizerBase, labels: Labels, side: str
) -> list[dict[str, Any]]:
    """Make the tokenizer's columns and, where there are labels, `labels`, a dict a row, cut to max_length tokens, the
    longer of two texts first."""
    targets = [{"labels": labels.number(row[data.label])} if data.label else {} for row in rows]
    texts = [str(row[data.text]) for row in rows]
    pairs = [str(row[data.text_pair]) for row in rows] if data.text_pair else None
    columns = tokenizer(texts, pairs, truncation=data.max_length is not None, max_length=data.max_length)
    tell_cut(num_cut(columns), len(rows), side, data.max_length)
    empty = next((index for index, ids in enumerate(columns["input_ids"]) if not len(ids)), None)
    if empty is not None:
        raise UserError(f"row {empty + 1} has no tokens: column {data.text!r} holds {texts[empty]!r}; remove the row")
    return [
        {**{name: column[index] for name, column in columns.items()}, **target} for index, target in enumerate(targets)
    ]

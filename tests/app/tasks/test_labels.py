"""Labels become the head's numbers; what is no label of the task is refused by value."""

from __future__ import annotations

from typing import Any

import pytest

from pedyra.app.recipe_sections import DataSection
from pedyra.app.tasks.text import known_labels


def labels(values: list[Any], class_names: list[str] | None = None, **data: Any):
    section = DataSection(source="toy", **data)
    return known_labels([{"label": value} for value in values], section, class_names)


def test_numbers_are_counted_also_when_written_as_text():
    assert labels([0, 2, 1]).count == 3
    found = labels(["0", "1", "1.0", True])
    assert (found.count, found.names, found.number("1")) == (2, ("0", "1"), 1)


def test_names_are_numbered_in_their_order_or_sorted():
    assert labels(["no", "yes", "no"]).number("yes") == 1
    given = labels(["no", "yes"], labels=["yes", "no", "perhaps"])
    assert (given.count, given.names, given.number("no")) == (3, ("yes", "no", "perhaps"), 1)


@pytest.mark.parametrize(
    ("found", "asked", "numbers"),
    [
        (labels(["1", "2", "3+", "1"]), ["1", "2", "3+"], [0, 1, 2]),  # names that look like numbers are names
        (labels([1, 2, "unk"]), [1, 2, "unk"], [0, 1, 2]),
        (labels([True, "false"]), [True, "false"], [0, 1]),
        (labels(["1", "0"], labels=["1", "0"]), ["1", "0"], [0, 1]),
        (labels(["10", "20"], labels=["10", "20"]), ["10", "20"], [0, 1]),
        (labels([1, 5, 3], labels=["1", "2", "3", "4", "5"]), [1, 5, 3.0], [0, 4, 2]),
        (labels(["1.0", "2.0", 1], labels=["1.0", "2.0"]), ["1.0", "2", 1.0], [0, 1, 0]),
        (labels(["0", "1"], labels=["no", "yes"]), ["1"], [1]),  # no name: the number of a class
        (labels([0, 1], class_names=["1", "2"]), [0, 1], [0, 1]),  # of a source whose rows hold class numbers
    ],
)
def test_numbers_are_names_where_they_are_given_or_found_as_names(found: Any, asked: list[Any], numbers: list[int]):
    assert [found.number(value) for value in asked] == numbers


def test_names_that_the_source_declares_go_with_its_numbers():
    found = labels([0, 0], class_names=["neg", "pos"])
    assert (found.count, found.number(1), found.number("pos")) == (2, 1, 1)


STARS: dict[str, Any] = {"values": ["1", "2", "other"]}
REFUSED = [
    *(({"values": [0, 1]}, value, "is none of the classes 0, 1;") for value in (2, -1, "7", 0.5, "x", None, [1])),
    ({"values": ["no", "yes"]}, "maybe", "label 'maybe' is none of the classes no, yes"),
    (STARS, "0", "label '0' is none of the classes 1, 2, other"),
    ({**STARS, "labels": ["1", "2", "other"]}, "0", "label '0' is none of the classes 1, 2, other"),
    *(
        ({"values": [0], "kind": "regression"}, value, "is no finite number; data.kind regression needs one")
        for value in ("x", None, float("inf"), "nan")
    ),
    ({"values": [0, 0]}, 0, "hold a single class of column 'label'"),
    (
        {"values": ["a"], "labels": ["a", "b"], "num_labels": 3},
        0,
        "data.num_labels is 3, but there are 2 classes: a, b",
    ),
    ({"values": [0, 10**12]}, 0, "column 'label' has class numbers up to 1000000000000, but none is 1;"),
    ({"values": [1, 2]}, 0, "has class numbers up to 2, but none is 0; classes"),
    ({"values": ["neg", " "]}, 0, r"training row 2 has no label \(column 'label'\); remove the row or fill it"),
]


@pytest.mark.parametrize(("given", "value", "told"), REFUSED)
def test_what_is_no_label_is_told(given: dict[str, Any], value: Any, told: str):
    with pytest.raises(ValueError, match=told):
        labels(**given).number(value)


def test_classes_may_be_rarer_than_the_rows_show():
    assert labels([0, 0], num_labels=2).count == 2
    assert labels([1, 2], num_labels=3).count == 3


def test_a_regression_takes_numbers():
    found = labels([0], kind="regression")
    assert (found.count, found.number("1.5"), found.number(2)) == (1, 1.5, 2.0)


def test_as_labels_of_a_file_classes_keep_their_numbers():
    for values, names in (
        ([0, 1, 2], None),
        ([0, 1], ["pos", "neg"]),
        (["b", "a"], None),
        ([0, 1], ["1", "2"]),
        ([0, 1, 2], ["1", "2", "other"]),
        (["1", "2", "other"], None),
    ):
        first = labels(values, class_names=names)
        again = labels(values, labels=list(first.names))
        assert [again.number(value) for value in values] == [first.number(value) for value in values]

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
    assert (found.count, found.names, found.number("1")) == (2, None, 1)


def test_names_are_numbered_in_their_order_or_sorted():
    assert labels(["no", "yes", "no"]).number("yes") == 1
    given = labels(["no", "yes"], labels=["yes", "no", "perhaps"])
    assert (given.count, given.names, given.number("no")) == (3, ("yes", "no", "perhaps"), 1)


def test_names_that_look_like_numbers_are_names():
    stars = labels(["1", "2", "3+", "1"])
    assert (stars.names, [stars.number(value) for value in ("1", "2", "3+")]) == (("1", "2", "3+"), [0, 1, 2])
    turned = labels(["1", "0"], labels=["1", "0"])
    assert (turned.number("1"), turned.number("0")) == (0, 1)
    assert labels(["10", "20"], labels=["10", "20"]).number("20") == 1
    assert labels(["0", "1"], labels=["no", "yes"]).number("1") == 1  # no name: the number of a class


def test_names_that_the_source_declares_go_with_its_numbers():
    found = labels([0, 0], class_names=["neg", "pos"])
    assert (found.count, found.number(1), found.number("pos")) == (2, 1, 1)


@pytest.mark.parametrize("value", [2, -1, "7"])
def test_a_number_out_of_range_is_refused(value: Any):
    with pytest.raises(ValueError, match=f"label {value!r} is none of the classes 0 to 1;"):
        labels([0, 1]).number(value)


@pytest.mark.parametrize("value", [0.5, "x", None, float("nan"), [1]])
def test_what_is_no_class_number_is_refused(value: Any):
    with pytest.raises(ValueError, match="is none of the classes 0 to 1;"):
        labels([0, 1]).number(value)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="label 'maybe' is none of the classes no, yes"):
        labels(["no", "yes"]).number("maybe")


def test_a_single_class_is_no_classification_and_a_wrong_count_is_told():
    with pytest.raises(ValueError, match="hold a single class of column 'label'"):
        labels([0, 0])
    assert labels([0, 0], num_labels=2).count == 2
    with pytest.raises(ValueError, match="data.num_labels is 3, but there are 2 classes: a, b"):
        labels(["a"], labels=["a", "b"], num_labels=3)


def test_a_regression_takes_finite_numbers():
    found = labels([0], kind="regression")
    assert (found.count, found.number("1.5"), found.number(2)) == (1, 1.5, 2.0)
    for wrong in ("x", None, float("inf"), "nan"):
        with pytest.raises(ValueError, match="is no finite number; data.kind regression needs one"):
            found.number(wrong)


def test_a_number_that_no_class_can_have_is_refused():
    assert labels([0, 99_999], num_labels=100_000).count == 100_000
    with pytest.raises(ValueError, match="column 'label' has class numbers up to 1000000000000, but none is 1;"):
        labels([0, 10**12])
    with pytest.raises(ValueError, match="num_labels"):
        labels([0, 1], num_labels=10**12)


def test_a_row_without_a_label_is_refused():
    with pytest.raises(ValueError, match=r"training row 2 has no label \(column 'label'\); remove the row or fill it"):
        labels(["neg", " ", "pos"])


def test_a_number_that_is_missing_is_told_unless_the_number_of_classes_is_given():
    for values, absent in (([1, 2], 0), ([0, 2], 1), ([1, 1], 0)):
        with pytest.raises(ValueError, match=f"has class numbers up to {max(values)}, but none is {absent}; classes"):
            labels(values)
    assert labels([1, 2], num_labels=3).count == 3


def test_names_that_are_numbers_are_those_in_the_data():
    stars = labels([1, 5, 3], labels=["1", "2", "3", "4", "5"])
    assert [stars.number(value) for value in (1, 5, 3.0)] == [0, 4, 2]
    declared = labels([0, 1], class_names=["1", "2"])  # by the source, whose rows hold class numbers
    assert (declared.number(1), declared.count, declared.as_labels) == (1, 2, ["0", "1"])


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
        again = labels(values, labels=first.as_labels)
        assert [again.number(value) for value in values] == [first.number(value) for value in values]


def test_numbers_among_names_are_names():
    mixed = labels([1, 2, "unk"])
    assert (mixed.names, [mixed.number(value) for value in (1, 2, "unk")]) == (("1", "2", "unk"), [0, 1, 2])
    flags = labels([True, "false"])
    assert (flags.number(True), flags.number("false")) == (0, 1)
    with pytest.raises(ValueError, match="label 0 is none of the classes 1, 2, unk"):
        mixed.number(0)


def test_no_number_of_a_class_is_a_label_where_names_are_numbers():
    found = labels(["1", "2", "other"])
    for known in (found, labels(["1", "2"], labels=found.as_labels)):
        with pytest.raises(ValueError, match="label '0' is none of the classes 1, 2, other"):
            known.number("0")


def test_names_of_numbers_may_be_written_as_the_rows_write_them():
    found = labels(["1.0", "2.0", 1], labels=["1.0", "2.0"])
    assert [found.number(value) for value in ("1.0", "2", 1.0)] == [0, 1, 0]
    with pytest.raises(ValueError, match=r"data.labels is \['1', '1.0'\]; two of them are one number, so remove one"):
        labels(["1"], labels=["1", "1.0"])

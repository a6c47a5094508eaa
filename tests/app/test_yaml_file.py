"""Settings in YAML: what is read, and how a mistake is told."""

from __future__ import annotations

import pytest

from pedyra.app.yaml_file import first_difference, parse_yaml
from pedyra.lora.spelling import did_you_mean


def test_the_first_difference_is_told_with_both_values():
    before = {"lora": {"r": 2, "alpha": 4}, "rank": {}, "seeds": [0, 1]}
    assert first_difference(before, before) is None
    changed = {**before, "lora": {"r": 4, "alpha": 4}}
    assert first_difference(before, changed) == "lora.r was 2 and is now 4"
    assert first_difference(before, {**changed, "seeds": [0]}) == "lora.r was 2 and is now 4 (and 1 more)"
    assert first_difference(before, {**before, "rank": {"moves": 3}}) == "rank.moves was None and is now 3"
    assert (
        first_difference({"tasks": {"toy": {}, "own": {}}}, {"tasks": {"own": {}}})
        == "tasks.toy was {} and is now None"
    )


@pytest.mark.parametrize(
    ("name", "more", "told"),
    [
        ("lorra", {}, "did you mean 'lora'?"),
        ("LoRA+", {}, "did you mean 'lora+'?"),
        ("quary", {}, "known are lora, lora+"),
        ("quary", {"otherwise": "see the manual"}, "see the manual"),
        ("lor", {"prefix": "model."}, "did you mean 'model.lora'?"),
    ],
)
def test_the_nearest_known_name_is_meant(name, more, told):
    assert did_you_mean(name, ["lora", "lora+"], **more) == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 2000 + "]" * 2000, "is not valid YAML: maximum recursion depth exceeded"),
        ("2001-99-99", "is not valid YAML: month must be in 1..12"),
        ("9" * 5000, "is not valid YAML: Exceeds the limit"),
        ("a: [", "is not valid YAML: .*line 1"),
        ("{{question}}", "is not valid YAML: .*found unhashable key"),
        ("lora: {}\nseed: 1\nseed: 2\n", 'is not valid YAML: .*duplicate key "seed".*line 3'),
        (b"\x84\xff", "is not valid YAML: .*codec"),
    ],
    ids=["deep", "date", "number", "open", "unhashable", "twice", "binary"],
)
def test_what_is_no_yaml_is_told_by_the_name_of_its_file(text: str | bytes, told: str):
    with pytest.raises(ValueError, match=f"^recipe.yaml {told}"):
        parse_yaml(text, "recipe.yaml")


def test_aliases_and_merge_keys_are_what_they_stand_for():
    text = "a: &a [1, 2]\nb: *a\nc: &c {d: 1, e: *a}\nf: {<<: *c, d: 3}"
    section = {"d": 1, "e": [1, 2]}
    assert parse_yaml(text, "x") == {"a": [1, 2], "b": [1, 2], "c": section, "f": {**section, "d": 3}}


def test_keys_of_other_types_are_kept():
    assert parse_yaml('lora: {1: x, "1": y}\n', "x") == {"lora": {1: "x", "1": "y"}}

"""How a mistake in settings is told: the name that was meant, and what two versions of them differ in."""

from __future__ import annotations

import pytest

from pedyra.spelling import did_you_mean
from pedyra.yaml_file import first_difference, parse_yaml


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


LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 8}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LAUGHS, "its aliases make more than 100,000 values"),
        ("a: &a [*a]", "it is nested too deep"),
        ("[" * 2000 + "]" * 2000, "it is nested too deep"),
        ("{a: " * 60 + "1" + "}" * 60, "it is nested too deep"),
        ("2001-99-99", "month must be in 1..12"),
        ("9" * 5000, "Exceeds the limit"),
    ],
    ids=["laughs", "cycle", "deep", "deep keys", "date", "number"],
)
def test_what_would_fill_the_memory_or_the_stack_is_told_by_the_name_of_its_file(text, told):
    with pytest.raises(ValueError, match=f"^recipe.yaml is not valid YAML: {told}"):
        parse_yaml(text, "recipe.yaml")


def test_aliases_are_what_they_stand_for():
    assert parse_yaml("a: &a [1, 2]\nb: *a\nc: {<<: &c {d: 1}, e: *a}", "x")["c"] == {"d": 1, "e": [1, 2]}

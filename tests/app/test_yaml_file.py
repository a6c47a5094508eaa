"""Settings in YAML: what is read, and how a mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pedyra.app.yaml_file import first_difference, parse_yaml, read_settings
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
        ("- &b {a: 1}\n- {<<: *b}\n", "merge keys"),
        (
            "- &b {a: 1}\n" + ("- {<<: [" + "*b, " * 300 + "]}\n") * 1000,
            "it has 1,2.* letters, and settings have at most",
        ),
    ],
    ids=["laughs", "cycle", "deep", "deep keys", "date", "number", "merge", "merge lists"],
)
def test_what_would_fill_the_memory_or_the_stack_is_told_by_the_name_of_its_file(text, told):
    with pytest.raises(ValueError, match=f"^recipe.yaml is not valid YAML: {told}"):
        parse_yaml(text, "recipe.yaml")


def test_aliases_are_what_they_stand_for():
    assert parse_yaml("a: &a [1, 2]\nb: *a\nc: {d: 1, e: *a}", "x") == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"d": 1, "e": [1, 2]},
    }


def read(path: Path, *overrides: str) -> dict[str, Any]:
    return read_settings(path, overrides, what="recipe", starts_with="model")


def test_no_key_may_repeat(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text('lora: {1: x, "1": y}\n')
    assert read(path)["lora"] == {1: "x", "1": "y"}
    path.write_text("lora: {}\nseed: 1\nseed: 2\n")
    with pytest.raises(ValueError, match='mine.yaml.* is not valid YAML: .*duplicate key "seed".*line 3'):
        read(path)


def test_what_is_no_yaml_is_told_by_the_name_of_its_file_or_its_override(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {}\n")
    with pytest.raises(ValueError, match=r"is not valid YAML: .*found unhashable key"):
        read(path, "data.template={{question}}")
    path.write_bytes(b"\x84\xff")
    with pytest.raises(ValueError, match="mine.yaml is no text"):
        read(path)

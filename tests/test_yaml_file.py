"""How a mistake in settings is told: the name that was meant, and what two versions of them differ in."""

from __future__ import annotations

import pytest

from pedyra.spelling import did_you_mean
from pedyra.yaml_file import first_difference


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

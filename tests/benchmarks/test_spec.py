"""NAME[:key=value,...]: one grammar, in the words of a recipe."""

from __future__ import annotations

import pytest

from benchmarks.spec import parse_method


def test_a_key_goes_where_a_recipe_has_it():
    spec = parse_method("pedyra:moves=4,orth_weight=1e-1,max_rank=null")
    assert (spec.name, spec.settings) == ("pedyra", {"moves": 4, "orth_weight": 0.1, "max_rank": None})
    assert parse_method("lora+:ratio=4").settings == {"ratio": 4}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lorra", "'lorra' is unknown; did you mean 'lora'"),
        ("lora+:ration=4", "ration is no setting of method lora.; did you mean 'ratio'"),
        ("pedyra:tolerance=1", "tolerance is no setting of method pedyra"),
        ("lora:moves=4", "moves is no setting of method lora; it has none"),
        ("pedyra:moves", "is not of the form NAME:key=value,key=value"),
        ("pedyra:", "is not of the form NAME:key=value,key=value"),
    ],
)
def test_what_cannot_be_is_told(text: str, told: str):
    with pytest.raises(ValueError, match=told):
        parse_method(text)


def test_rows_of_other_defaults_or_settings_are_told_apart():
    digests = [parse_method(text).digest for text in ("lora", "pedyra", "pedyra:alpha=1")]
    assert digests[0] == "" and len(set(digests)) == 3

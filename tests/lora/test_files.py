"""What is read from files is what it must be, or is refused with the file and the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from pedyra.lora.files import check_shape, read_json, read_rows

SHAPE = {"step": int, "loss": (float, None), "ranks": {str: int}, "rows": [{"name": str}], "budget": ({"n": int}, None)}
WHOLE = {"step": 3, "loss": 1, "ranks": {"a": 2}, "rows": [{"name": "x", "more": 1}], "budget": {"n": 1}}


@pytest.mark.parametrize("change", [{}, {"loss": None}, {"loss": 0.5}, {"ranks": {}}, {"rows": []}, {"budget": None}])
def test_what_is_of_the_shape_passes(change):
    check_shape({**WHOLE, **change}, SHAPE, "file")


def test_what_may_be_null_may_be_absent():
    check_shape({key: WHOLE[key] for key in ("step", "ranks", "rows")}, SHAPE, "file")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"step": True}, "file: step is True, must be a whole number"),
        ({"step": 1.5}, "file: step is 1.5, must be a whole number"),
        ({"loss": "1"}, "file: loss is '1', must be a number or null"),
        ({"ranks": []}, "file: ranks is [], must be an object"),
        ({"ranks": {"a": None}}, "file: ranks.a is None, must be a whole number"),
        ({"rows": [{"name": "x"}, {}]}, "file: rows[1].name is nothing, must be text"),
        ({"rows": {}}, "file: rows is {}, must be a list"),
        ({"budget": {"n": "x" * 99}}, f"file: budget.n is '{'x' * 39}, must be a whole number"),
    ],
)
def test_the_field_that_is_wrong_is_named(change, told):
    with pytest.raises(ValueError) as raised:
        check_shape({**WHOLE, **change}, SHAPE, "file")
    assert str(raised.value) == told


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b"1" * 5000, b""])
def test_damaged_json_is_named(tmp_path: Path, content: bytes):
    for read in (read_json, read_rows):
        (tmp_path / "file").write_bytes(content + b"\n")
        with pytest.raises(ValueError, match=r"^/.*/file(, line 1)? is damaged: "):
            read(tmp_path / "file")


def test_a_list_is_no_object(tmp_path: Path):
    (tmp_path / "file").write_text('{"a": 1}\n[1]\n')
    with pytest.raises(ValueError, match=r"file, line 2: the whole is \[1\], must be an object"):
        read_rows(tmp_path / "file")

"""What is read from files is what it must be, or is refused with the file and the field."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import pytest

import pedyra
from pedyra.lora.files import check_shape, read_json, read_rows, write_folder
from pedyra.lora.folder import copy_processing

SHAPE = {"step": int, "loss": (float, None), "ranks": dict, "rows": list}
WHOLE = {"step": 3, "loss": 1, "ranks": {"a": 2}, "rows": [], "more": 1}


@pytest.mark.parametrize(
    "value", [WHOLE, {**WHOLE, "loss": None}, {key: WHOLE[key] for key in ("step", "ranks", "rows")}]
)
def test_what_is_of_the_shape_passes_and_what_may_be_null_may_be_absent(value):
    check_shape(value, SHAPE, "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": True}, "file: step is True, must be a whole number"),
        ({"step": 1.5}, "file: step is 1.5, must be a whole number"),
        ({"loss": "1"}, "file: loss is '1', must be a number or null"),
        ({"ranks": []}, "file: ranks is [], must be an object"),
        ({"rows": "x" * 99}, f"file: rows is '{'x' * 39}, must be a list"),
    ],
)
def test_the_field_that_is_wrong_is_named(change, message):
    with pytest.raises(ValueError) as raised:
        check_shape({**WHOLE, **change}, SHAPE, "file")
    assert str(raised.value) == message


@pytest.mark.parametrize("content", [b"{", b"\xff", b"1" * 5000, b"", b"[" * 100_000])
def test_damaged_json_is_named(tmp_path: Path, content: bytes):
    for read in (read_json, read_rows):
        (tmp_path / "file").write_bytes(content + b"\n")
        with pytest.raises(ValueError, match=r"^/.*/file(, line 1)? is damaged: "):
            read(tmp_path / "file")


def test_a_list_is_no_object(tmp_path: Path):
    (tmp_path / "file").write_text('{"a": 1}\n[1]\n')
    with pytest.raises(ValueError, match=r"file, line 2: the whole is \[1\], must be an object"):
        read_rows(tmp_path / "file")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_kill_while_a_folder_is_replaced_leaves_the_old_one_whole(tmp_path: Path, monkeypatch, killed: int):
    def fill(text: str):
        return lambda part: (part.mkdir(), (part / "weights").write_text(text))

    write_folder(tmp_path / "fit", fill("old"))
    renames, rename = [], os.replace

    def replace(source: Path, target: Path) -> None:
        if len(renames) == killed:
            raise KeyboardInterrupt
        renames.append(source)
        rename(source, target)

    with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
        patched.setattr(os, "replace", replace)
        write_folder(tmp_path / "fit", fill("new"))
    assert [file.read_text() for file in tmp_path.rglob("weights")] == ["old"]

    def fails(part: Path) -> None:
        raise OSError("no space")

    with suppress(OSError):
        write_folder(tmp_path / "fit", fails)
    assert (tmp_path / "fit" / "weights").read_text() == "old"  # it was brought back
    write_folder(tmp_path / "fit", fill("new"))
    assert [file.read_text() for file in tmp_path.rglob("weights")] == ["new"]


def test_a_link_that_leaves_its_folder_is_not_copied(tmp_path: Path):
    secret, adapter, out = tmp_path / "secret", tmp_path / "adapter", tmp_path / "out"
    adapter.mkdir()
    out.mkdir()
    secret.write_text("mine")
    (adapter / "merges.txt").write_text("theirs")
    (adapter / "vocab.txt").symlink_to(secret)
    (adapter / "tokenizer.model").symlink_to(adapter / "merges.txt")
    copy_processing(adapter, out)
    assert {file.name for file in out.iterdir()} == {"merges.txt", "tokenizer.model"}


def test_a_tokenizer_of_the_hubs_cache_is_copied(tmp_path: Path):
    """Its files are links from a snapshot into the blobs of the same repository."""
    snapshot, blobs, out = tmp_path / "repo" / "snapshots" / "1", tmp_path / "repo" / "blobs", tmp_path / "out"
    for folder in (snapshot, blobs, out):
        folder.mkdir(parents=True)
    (blobs / "abc").write_text("theirs")
    (snapshot / "vocab.txt").symlink_to(Path("..", "..", "blobs", "abc"))
    copy_processing(snapshot, out)
    assert (out / "vocab.txt").read_text() == "theirs"


WRITES = re.compile(r"""write_text\(|write_bytes\(|\bopen\([^)]*["'][rb]*[wax+]""")
ELSEWHERE = {
    "lora/files.py": "it is the place that writes",
    "app/console.py": "--json may name a device or a pipe of the user's own",
    "lab/compare/ray_engine.py": "a node writes into its log in a folder of its own, and an archive goes to memory",
    "lab/compare/jobs.py": "a child writes into its log, which was made by write_file",
}


def test_files_are_written_in_one_place():
    package = Path(pedyra.__file__).parent
    result = {file.relative_to(package).as_posix() for file in package.rglob("*.py") if WRITES.search(file.read_text())}
    assert result == set(ELSEWHERE)

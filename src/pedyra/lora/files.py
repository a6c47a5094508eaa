"""Files are whole or absent, never half-written; some have digests, and rows are lines of JSON.

A folder may come from somebody else, with symbolic links in it. Nothing here writes, moves or removes what a link leads
to: a link is replaced or removed itself, or is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pedyra.errors import UserError


def write_file(path: Path, content: str | bytes) -> None:
    """Write `path` whole or not at all: temporary name, fsync, rename. Text is UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    remove(part)
    try:
        with part.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_folder(path: Path, save: Callable[[Path], Any]) -> None:
    """Let `save` fill a folder that appears as `path` whole or not at all, and replaces an old one. A kill leaves one
    of the two whole: the old one is first renamed to `.<name>.old`, and back by the next call."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Links above the folder are followed, and the folder itself is none; "." and ".." have no name of their own.
    path = path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name
    part, old = (path.with_name(f".{path.name}.{state}") for state in ("part", "old"))
    if old.is_dir() and not old.is_symlink() and not path.exists():
        os.replace(old, path)
    remove(part)
    remove(old)
    try:
        save(part)
        sync_folder(part)
        if path.exists() or path.is_symlink():
            os.replace(path, old)
        os.replace(part, path)
        remove(old)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file, a folder with its contents, or a link, but never the target of a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)  # which removes the links inside it, too
    else:
        path.unlink(missing_ok=True)


def refuse_link(path: Path) -> None:
    """Raise ValueError where `path` is a link, because a write would follow it to another place."""
    if path.is_symlink():
        raise UserError(f"{path} is a link, and nothing is written through one; remove the link")


def refuse_unwritable(path: Path, name: str) -> None:
    """Raise ValueError, beginning with `name`, where no file can be made at `path`: in the nearest folder above it that
    exists there is no permission, or the disk is read-only."""
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not os.access(nearest, os.W_OK) and nearest.exists():  # another process may have removed it
        raise UserError(f"{name} cannot be written: no permission in {nearest}; choose another folder")


def refuse_occupied(out: Path, records: Collection[str], what: str, overwrite: bool = False) -> None:
    """Raise ValueError where no folder may be written as `out`: a link, a place without permission, or one that holds
    anything but, with `overwrite`, an earlier one of its kind (`what`), which has one of the files `records`."""
    if out.is_symlink():
        raise UserError(f"{out} is a link, which is not followed; remove it, or choose another folder")
    if os.path.ismount(out):
        raise UserError(f"{out} is a mount point, and a folder cannot be renamed over one; give a folder inside it")
    refuse_unwritable(out.absolute().parent, str(out))  # a new folder is written beside it and then renamed
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not any((out / record).is_file() for record in records):
        raise UserError(f"{out} already holds files, and no earlier {what}; choose another folder, or remove it")
    if not overwrite:
        raise UserError(f"{out} already holds an earlier {what}; give --overwrite to replace it, or another folder")


# safetensors and torch's zip writer report a failed write by these words, and raise no OSError.
_FAILED_WRITES = ("No space left on device", "PytorchStreamWriter", "inline_container", "iostream error")


def is_disk_full(error: BaseException) -> bool:
    """Tell whether a full disk is the cause of this error."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    below = error.__cause__ or error.__context__
    return any(sign in str(error) for sign in _FAILED_WRITES) or (below is not None and is_disk_full(below))


def sync_file(path: Path) -> None:
    """Flush a file to the disk (fsync), if it exists."""
    how = "r+b" if os.name == "nt" else "rb"  # Windows flushes only files that are open for writing
    if path.is_file():
        with path.open(how) as handle:
            os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    for file in folder.rglob("*"):
        sync_file(file)


SUMS = "SHA256SUMS"
"""This file lists the digests of the files beside it; `sha256sum -c SHA256SUMS` checks them too."""


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Write the digests of these files of `folder` to its SHA256SUMS."""
    write_file(folder / SUMS, "".join(f"{digest(folder / name)}  {name}\n" for name in sorted(names)))


def read_sums(folder: Path) -> dict[str, str]:
    """Read file -> digest from the SHA256SUMS of `folder`. Raises ValueError where there is none, or no such file."""
    if not (folder / SUMS).is_file():
        raise UserError(f"{folder / SUMS} is missing")
    lines = (folder / SUMS).read_bytes().decode(errors="replace").splitlines()
    matches = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in lines]
    if not all(matches):
        raise UserError(f"{folder / SUMS} is damaged")
    return {line[2]: line[1] for line in matches if line}


def check_sums(folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError, with the file, where one of these files of `folder` does not match its SHA256SUMS."""
    sums = read_sums(folder)
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing")
        if name not in sums:
            raise UserError(f"{folder / name} is not in {SUMS}: of another save")
        if digest(folder / name) != sums[name]:
            raise UserError(f"{folder / name} does not match {SUMS}: damaged, or of another save")


def digest(path: Path) -> str:
    """Compute SHA-256 of the bytes of a file."""
    result = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            result.update(part)
    return result.hexdigest()


def json_line(row: Mapping[str, Any]) -> str:
    """Write the row as a line of JSON; NaN and infinities, which JSON lacks, become null."""
    return json.dumps(without_nan(row), allow_nan=False) + "\n"


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append `json_line`. Raises ValueError where `path` is a link."""
    refuse_link(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(json_line(row))


def read_rows(path: Path, shape: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Read the JSON objects of a file's lines, none if it is absent; a last line cut short by a crash is left out.
    Raises ValueError, with file and number, for a line that is no JSON object of this shape (see `check_shape`)."""
    if not path.is_file():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    return [parse_json(line, f"{path}, line {number}", shape or {}) for number, line in enumerate(lines, start=1)]


def read_json(path: Path, shape: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read the JSON object in a file. Raises ValueError, with the file's name, for anything else and another shape."""
    return parse_json(path.read_bytes(), str(path), shape or {})


def parse_json(text: str | bytes, where: str, shape: Mapping[str, Any]) -> dict[str, Any]:
    """Read JSON of this shape. Raises ValueError, which begins with `where`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged: {error}") from None
    check_shape(value, shape, where)
    return value


_ABSENT = object()


def check_shape(value: Any, shape: Mapping[str, Any], where: str) -> None:
    """Raise ValueError, which begins with `where` and names the field, unless JSON is an object of this shape.

    It is {field: its type, or a tuple of types}; other fields may be there. float takes whole numbers, int no true or
    false, and None what is null or absent.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: the whole is {repr(value)[:40]}, must be an object")
    for field, types in shape.items():
        types, content = types if isinstance(types, tuple) else (types,), value.get(field, _ABSENT)
        if not any(_fits(content, each) for each in types):
            shown_value = "nothing" if content is _ABSENT else repr(content)[:40]
            raise UserError(f"{where}: {field} is {shown_value}, must be {' or '.join(_TYPES[each] for each in types)}")


def _fits(value: Any, kind: type | None) -> bool:
    if kind is None:
        return value is None or value is _ABSENT
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


_TYPES = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    None: "null",
}


def without_nan(value: Any) -> Any:
    """Replace every NaN and infinity in the value, which JSON lacks, by None."""
    if isinstance(value, Mapping):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Files that are whole or absent, never half-written, their digests, and JSON lines."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def write_file(path: Path, content: str | bytes) -> None:
    """Write `path` whole or not at all: temporary name, fsync, rename. Text is UTF-8."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_folder(path: Path, save: Callable[[Path], Any]) -> None:
    """Let `save` fill a folder that appears as `path` whole or not at all; an older one is replaced."""
    path = path.resolve()  # "." has no name
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        save(part)
        sync_folder(part)
        if path.exists():
            shutil.rmtree(path)
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """See to it that every file in `folder` is on the disk, and not only on its way there."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


SUMS = "SHA256SUMS"
"""The digests of the files beside it; `sha256sum -c SHA256SUMS` checks them too."""


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Write the digests of these files of `folder` to its SHA256SUMS."""
    write_file(folder / SUMS, "".join(f"{_digest(folder / name)}  {name}\n" for name in sorted(names)))


def read_sums(folder: Path) -> dict[str, str]:
    """File -> digest, by the SHA256SUMS of `folder`. Raises ValueError where there is none, or no such file."""
    if not (folder / SUMS).is_file():
        raise ValueError(f"{SUMS} is missing")
    lines = (folder / SUMS).read_bytes().decode(errors="replace").splitlines()
    found = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in lines]
    if not all(found):
        raise ValueError(f"{SUMS} is damaged")
    return {line[2]: line[1] for line in found if line}


def check_sums(folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError, which names the file, where one of these of `folder` is not what its SHA256SUMS says it is."""
    sums = read_sums(folder)
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if name not in sums:
            raise ValueError(f"{name} is not in {SUMS}: of another save")
        if _digest(folder / name) != sums[name]:
            raise ValueError(f"{name} does not match {SUMS}: damaged, or of another save")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def json_line(row: Mapping[str, Any]) -> str:
    """The row as a line of JSON, which has no NaN and no infinities: null takes their place."""
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append `json_line`."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json_line(row))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, none if it is absent; a last line cut short by a crash is left out.

    Raises ValueError for any other line that is no JSON.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number} of {path} is damaged: {error}") from None
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

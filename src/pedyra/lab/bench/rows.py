"""The JSON lines of a benchmark that may be killed: each row is appended when it is done, and never made twice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pedyra.lora.files import append_row, json_line, read_rows

Row = dict[str, Any]

PLANTED_KEY = ("method", "config", "architecture", "width", "depth", "rank", "profile", "noise", "seed", "steps", "lr")
TRANSFER_KEY = ("method", "config", "rank", "lr", "seed", "steps", "batch", "base")
"""What makes two rows of a benchmark the same run; `base` names the texts and the pre-trained model."""


class RowFile:
    """Rows in memory and, with a `path`, in a file too. A row is known by its values of the `key` fields.

    Raises:
        ValueError: the file's folder does not exist, or it holds something else than rows with the first of these.
    """

    def __init__(self, path: Path | None, key: Sequence[str]) -> None:
        self.path, self.key = path, tuple(key)
        self.rows: list[Row] = []
        if path is None:
            return
        if not path.parent.is_dir():
            raise ValueError(f"--json {path}: the folder {path.parent} does not exist; create it first")
        try:
            self.rows = read_rows(path)
        except ValueError as error:
            raise ValueError(f"--json {path} is no file of JSON lines ({error}); name another file") from error
        for row in self.rows:
            if self.key[0] not in row:
                raise ValueError(f"--json {path} holds rows of something else; name another file")
        if path.is_file() and not path.read_bytes().endswith(b"\n"):  # cut short by a kill
            path.write_text("".join(map(json_line, self.rows)), encoding="utf-8")

    def complete(self, jobs: Iterable[Row], run: Callable[[Row], Row]) -> Iterator[Row]:
        """The row of every job (its key fields): a known one as it is, a missing one from `run`, added at once."""
        known = {self._id(row): row for row in self.rows}
        for job in jobs:
            row = known.get(self._id(job))
            if row is None:
                row = {name: _finite(value) for name, value in {**job, **run(job)}.items()}
                known[self._id(row)] = row
                self.rows.append(row)
                if self.path is not None:
                    append_row(self.path, row)
            yield row

    def _id(self, row: Mapping[str, Any]) -> str:
        return json.dumps([row.get(field) for field in self.key])


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""The rows of a benchmark are kept as JSON lines, each made once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pedyra.errors import UserError
from pedyra.lora.files import append_row, json_line, read_rows, write_file

Row = dict[str, Any]


class RowFile:
    """It holds rows in memory and, with a `path`, in a file too. A row is known by its values of the `key` fields, and
    by its `config`, which not every row has."""

    def __init__(self, path: Path | None, key: Sequence[str]) -> None:
        self.path, self.key = path, (*key, "config")
        self.rows: list[Row] = []
        if path is None:
            return
        try:
            self.rows = read_rows(path)
        except ValueError as error:
            raise UserError(f"--json {path} is no file of JSON lines ({error}); name another file") from error
        if any(field not in row for row in self.rows for field in key):
            raise UserError(f"--json {path} holds rows of something else; name another file")
        if path.is_file() and not path.read_bytes().endswith(b"\n"):  # cut short by a kill
            write_file(path, "".join(map(json_line, self.rows)))

    def complete(self, jobs: Iterable[Row], run: Callable[[Row], Row]) -> Iterator[Row]:
        """Yield the row of every job (its key fields): a known one as it is, else one from `run`, added at once."""
        rows_by_key = {self._id(row): row for row in self.rows}
        for job in jobs:
            row = rows_by_key.get(self._id(job))
            if row is None:
                row = json.loads(json_line({**job, **run(job)}))
                rows_by_key[self._id(row)] = row
                self.rows.append(row)
                if self.path is not None:
                    append_row(self.path, row)
            yield row

    def keep(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows; each is in the file as soon as it is there, in the place of one of the same key."""
        for row in rows:
            others = [each for each in self.rows if self._id(each) != self._id(row)]
            replaces, self.rows = len(others) < len(self.rows), [*others, row]
            if self.path is not None and replaces:
                write_file(self.path, "".join(map(json_line, self.rows)))
            elif self.path is not None:
                append_row(self.path, row)
            yield row

    def _id(self, row: Mapping[str, Any]) -> str:
        return json.dumps([row.get(field) for field in self.key])


def shown(value: Any) -> str:
    """Write a value of a line as text."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else "diverged"
    return str(value)

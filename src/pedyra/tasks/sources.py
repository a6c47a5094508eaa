"""Where rows come from: packaged text, generated text, a local file, the Hub."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pyarrow.parquet

from pedyra.hub import why_not_on_hub
from pedyra.recipe_sections import DataSection, template_columns
from pedyra.tasks.reviews import reviews
from pedyra.tasks.split import Rows
from pedyra.tasks.toy import toy

PLANTED_ROWS = 8192
_DAMAGED = (OSError, EOFError, UnicodeDecodeError, csv.Error, pyarrow.ArrowInvalid, zlib.error, lzma.LZMAError)


def planted() -> Rows:
    """Numbers that seed the vectors of the planted problem: {"row": number}."""
    return [{"row": number} for number in range(PLANTED_ROWS)]


PACKAGED = {"reviews": reviews, "toy": toy, "planted": planted}
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def load_rows(data: DataSection) -> tuple[Rows, Rows | None, list[str] | None]:
    """Training rows, validation rows (None: to be split off), and class names where the source declares them.

    Rows hold the columns that `data` names and no others. Raises ValueError for a source or column that is not there.
    """
    columns = _columns(data)
    if data.source in PACKAGED:
        if data.validation is not None:
            raise ValueError(f"data.source {data.source} has no other split; remove data.validation")
        return _select(PACKAGED[data.source](), columns, data.source), None, None
    if _format(data.source):
        train = _select(_read_file(data.source, "source"), columns, data.source, data.messages)
        if data.validation is None:
            return train, None, None
        return train, _select(_read_file(data.validation, "validation"), columns, data.validation, data.messages), None
    train, names = _read_hub(data, data.split, columns)
    return train, _read_hub(data, data.validation, columns)[0] if data.validation else None, names


def _columns(data: DataSection) -> list[str]:
    if data.kind == "planted":
        named = ["row"]
    elif data.kind == "causal_lm":
        named = [data.prompt, data.completion, data.messages, *template_columns(data.template or "")]
    else:
        named = [data.text, data.text_pair, data.label]
    return list(dict.fromkeys(name for name in [*named, data.group_by] if name is not None))


def _select(rows: Iterable[dict[str, Any]], columns: list[str], where: str, chat: str | None = None) -> Rows:
    selected = []
    for number, row in enumerate(rows, start=1):
        for column in columns:
            if row.get(column) is None:
                _refuse_column(column, row, where, number)
            if isinstance(row[column], (list, dict)) and column != chat:
                kind = type(row[column]).__name__
                raise ValueError(f"row {number} of {where} has a {kind} in column {column!r}, where text is expected")
        selected.append({column: row[column] for column in columns})
    return selected


def _refuse_column(column: str, row: dict[str, Any], where: str, number: int) -> None:
    if column in row:
        raise ValueError(f"row {number} of {where} has no value in column {column!r}; remove the row or fill it")
    raise ValueError(f"{where} has no column {column!r} (row {number}); its columns are {', '.join(map(str, row))}")


def _format(source: str) -> str | None:
    """The format that a file name ends in, whether compressed or not; None if it is no file name."""
    suffixes = [suffix.lower() for suffix in Path(source).suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def _read_file(source: str, key: str) -> Iterable[dict[str, Any]]:
    path, kind = Path(source).expanduser(), _format(source)
    if not path.is_file():
        raise ValueError(f"data.{key} {source!r} does not exist; give a file (from {Path.cwd()}) or a Hub data set")
    if kind is None:
        raise ValueError(f"data.{key} {source!r} has no known format; a file ends in {', '.join(FORMATS)}")
    try:
        if kind == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        opener = OPENERS.get(path.suffix.lower(), open)
        with opener(path, "rt", encoding="utf-8-sig", newline="" if kind in (".csv", ".tsv") else None) as file:
            if kind in (".csv", ".tsv"):
                rows = list(csv.DictReader(file, delimiter="," if kind == ".csv" else "\t", strict=True))
                if long := [number for number, row in enumerate(rows, start=1) if any(row.get(None) or ())]:
                    raise ValueError(f"row {long[0]} of {source} has more cells than the first line has column names")
                return rows
            return _json_rows(file.read(), source)
    except _DAMAGED as error:
        raise ValueError(f"data.{key} {source!r} cannot be read as {kind[1:]}: {error}") from error


def _json_rows(text: str, source: str) -> list[dict[str, Any]]:
    """JSON lines, or one JSON list of objects."""
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else None
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is no valid JSON list: {error}") from None
    if rows is None:
        rows = []
        # Not splitlines(): JSON strings may hold the other line separators of Unicode.
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {source} is no valid JSON: {error}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} of {source} is no JSON object; a row maps column names to values")
    return rows


def _read_hub(data: DataSection, split: str, columns: list[str]) -> tuple[Rows, list[str] | None]:
    from datasets import ClassLabel, load_dataset

    nowhere = f"data.source {data.source!r} is no packaged data set and no file that ends in {', '.join(FORMATS)}, and "
    if not Path(data.source).exists() and (reason := why_not_on_hub(data.source, "dataset")) is not None:
        near = get_close_matches(data.source, PACKAGED, n=1)
        raise ValueError(nowhere + reason + (f"; did you mean {near[0]!r}?" if near else ""))
    try:
        dataset = load_dataset(data.source, data.config, split=split)
    except Exception as error:  # the Hub client's errors share no base but Exception
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{nowhere}the Hub did not give it: {told[0]}") from error
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{data.source} has no column {missing[0]!r}; its columns are {', '.join(dataset.column_names)}"
        )
    feature = dataset.features.get(data.label)
    names = list(feature.names) if isinstance(feature, ClassLabel) else None
    return _select(dataset.select_columns(columns).to_list(), columns, data.source, data.messages), names

"""Where rows come from: packaged text, generated text, a local file, the Hub.

Local files are read as they are, by the standard library and pyarrow. `datasets.load_dataset` would make times of texts
that look like dates, keep a copy of each file, need a disk to write to, and tell a damaged row in several lines.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet

from pedyra.app.recipe_sections import GENERATED, DataSection, template_columns
from pedyra.app.tasks.reviews import reviews
from pedyra.app.tasks.split import Rows
from pedyra.app.tasks.toy import toy
from pedyra.lora.hub import told_by_hub, why_not_on_hub
from pedyra.lora.spelling import did_you_mean

_DAMAGED = (OSError, EOFError, UnicodeDecodeError, csv.Error, pyarrow.ArrowInvalid, zlib.error, lzma.LZMAError)


PACKAGED = {"reviews": reviews, "toy": toy}
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def load_rows(data: DataSection) -> tuple[Rows, Rows | None, list[str] | None]:
    """Training rows, validation rows (None: to be split off), and class names where the source declares them.

    Rows hold the columns that `data` names and no others. Raises ValueError for a source or column that is not there.
    """
    if data.source in PACKAGED:
        if data.validation is not None:
            raise ValueError(f"data.source {data.source} has no other split; remove data.validation")
        return _select(PACKAGED[data.source](), _columns(data), data.source, _structured(data)), None, None
    train, names = _read(data, data.source if _format(data.source) else data.split)
    return train, validation_rows(data, data.validation) if data.validation else None, names


def validation_rows(data: DataSection, split: str) -> Rows:
    """The rows of a validation split of a Hub data set, or of a local file, with the columns that `data` names."""
    return _read(data, split)[0]


def _read(data: DataSection, split: str) -> tuple[Rows, list[str] | None]:
    key = "source" if split == data.source else "validation"
    columns, structured = _columns(data), _structured(data)
    if _format(data.source):
        return _select(_read_file(split, f"data.{key}"), columns, split, structured), None
    return read_hub(data.source, data.config, split, columns, structured, label=data.label)


def read_test_rows(source: str, config: str | None, split: str, columns: list[str] | None, key: str) -> Rows:
    """Rows of a file, or of a split of a Hub data set, to be answered; `columns` None: all that there are, as they are.

    Raises ValueError, beginning with `key`, for a source or column that is not there.
    """
    if not _format(source):
        return read_hub(source, config, split, columns, label=None, key=key)[0]
    rows = _read_file(source, key)
    return list(rows) if columns is None else _select(rows, columns, source)


def _structured(data: DataSection) -> tuple[str | None]:
    """The columns that hold more than text or a number."""
    return (data.answers,) if data.kind == "question_answering" else (data.messages,)


def _columns(data: DataSection) -> list[str]:
    if data.kind == "question_answering":
        named = [data.question, data.context, data.answers]
    elif data.kind in GENERATED:
        named = [data.prompt, data.completion, data.messages, *template_columns(data.template or "")]
    else:
        named = [data.text, data.text_pair, data.label]
    return list(dict.fromkeys(name for name in [*named, data.group_by] if name is not None))


def _select(
    rows: Iterable[dict[str, Any]], columns: list[str], where: str, structured: Sequence[str | None] = ()
) -> Rows:
    selected = []
    for number, row in enumerate(rows, start=1):
        for column in columns:
            if row.get(column) is None:
                _refuse_column(column, row, where, number)
            if isinstance(row[column], (list, dict)) and column not in structured:
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
        raise ValueError(f"{key} {source!r} does not exist; give a file (from {Path.cwd()}) or a Hub data set")
    if kind is None:
        raise ValueError(f"{key} {source!r} has no known format; a file ends in {', '.join(FORMATS)}")
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
        raise ValueError(f"{key} {source!r} cannot be read as {kind[1:]}: {error}") from error


def _json_rows(text: str, source: str) -> list[dict[str, Any]]:
    """JSON lines, or one JSON list of objects."""
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is no valid JSON list: {error}") from None
    if rows is None:
        rows = []
        # Not splitlines(): JSON strings may hold the other line separators of Unicode.
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} of {source} is no valid JSON: {error}") from None
    halves = _HALF.search(text) is not None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} of {source} is no JSON object; a row maps column names to values")
        if halves and _HALF.search(json.dumps(row)):
            _refuse_halves(row, f"row {number} of {source}")
    return rows


_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""Of a character beyond the first 65,536, which JSON writes as two of these; one alone cannot be encoded."""


def _refuse_halves(row: dict[str, Any], where: str) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(
            f"{where} holds half of a character ({half!r}), which no tokenizer takes; correct it"
        ) from None


def read_hub(
    source: str,
    config: str | None,
    split: str,
    columns: list[str] | None,
    structured: Sequence[str | None] = (),
    *,
    label: str | None,
    key: str = "data.source",
) -> tuple[Rows, list[str] | None]:
    """The rows of a Hub data set's split, and the class names of its column `label` if it declares them.

    Raises ValueError for what is not there, or may not be read without logging in.
    """
    from datasets import ClassLabel, load_dataset

    nowhere = f"{key} {source!r} is no packaged data set and no file that ends in {', '.join(FORMATS)}, and "
    if not Path(source).exists() and (reason := why_not_on_hub(source, "dataset")) is not None:
        raise ValueError("; ".join(filter(None, (nowhere + reason, did_you_mean(source, PACKAGED, otherwise="")))))
    try:
        dataset = load_dataset(source, config, split=split)
    except Exception as error:  # the Hub client's errors share no base but Exception
        raise ValueError(f"{nowhere}the Hub did not give it: {told_by_hub(error)}") from error
    if columns is None:
        return dataset.to_list(), None
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ValueError(f"{source} has no column {missing[0]!r}; its columns are {', '.join(dataset.column_names)}")
    feature = dataset.features.get(label or "")
    names = list(feature.names) if isinstance(feature, ClassLabel) else None
    rows = dataset.select_columns(columns).to_list()
    return _select(rows, columns, source, structured), names

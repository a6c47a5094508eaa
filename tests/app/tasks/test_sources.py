"""Rows come from every kind of file as they were written; a source or column that is not there is told."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import warnings
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from pedyra.app.recipe_sections import DataSection
from pedyra.app.tasks import sources
from pedyra.app.tasks.sources import check_apart, load_rows

ROWS = [{"text": 'a "quoted", text\r\nof two lines \u2028', "label": 0}, {"text": "NA", "label": 1}]


def rows(source: Any, **data: Any) -> Any:
    return load_rows(DataSection(source=str(source), **data))[0]


CSV = 'text,label\n"a ""quoted"", text\r\nof two lines \u2028",0\nNA,1\n'


@pytest.mark.parametrize(
    ("name", "opener"),
    [
        ("d.jsonl", open),
        ("d.json", open),
        ("d.jsonl.gz", gzip.open),
        ("d.jsonl.bz2", bz2.open),
        ("D.JSONL.xz", lzma.open),
    ],
)
def test_json_lines(tmp_path: Path, name: str, opener: Any):
    with opener(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n")
    assert rows(tmp_path / name) == ROWS


def test_a_json_list(tmp_path: Path):
    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    assert rows(tmp_path / "d.json") == ROWS


@pytest.mark.parametrize("start", ["", "\ufeff"])  # the second is the mark that spreadsheets put first
def test_separated_values_keep_every_cell_as_text(tmp_path: Path, start: str):
    (tmp_path / "d.csv").write_bytes((start + CSV).encode())
    assert rows(tmp_path / "d.csv") == [{**row, "label": str(row["label"])} for row in ROWS]


def test_parquet(tmp_path: Path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    assert rows(tmp_path / "d.parquet") == ROWS


def test_a_second_file_holds_the_validation_rows(tmp_path: Path):
    for name, row in zip(("a.jsonl", "b.jsonl"), ROWS, strict=True):
        (tmp_path / name).write_text(json.dumps(row))
    train, held, names = load_rows(DataSection(source=str(tmp_path / "a.jsonl"), validation=str(tmp_path / "b.jsonl")))
    assert (train, held, names) == (ROWS[:1], ROWS[1:], None)


def test_only_named_columns_are_kept_those_of_a_template_too(tmp_path: Path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"q": "1+1", "hint": "add", "a": "2", "other": 3}))
    kept = rows(tmp_path / "d.jsonl", kind="causal_lm", template="{q} ({hint}) {{sic}}", completion="a")
    assert kept == [{"q": "1+1", "hint": "add", "a": "2"}]


QA = '{"text": "one", "label": 0, "answers": {"text": ["one"], "answer_start": [0]}}'
REFUSED = [
    ("d.jsonl", '{"txt": "a", "label": 0}', {}, "has no column 'text' (row 1); its columns are txt, label"),
    ("d.csv", "text,label\na,0\n", {"group_by": "film"}, "has no column 'film' (row 1)"),
    ("d.jsonl", '{"text": "a", "label": null}', {}, "row 1 of d.jsonl has no value in column 'label'"),
    ("d.jsonl", '{"text": "a", "label": 0}\n{"text": "a"', {}, "cannot be read as jsonl: line 2: "),
    ("d.json", '[{"text": ]', {}, "cannot be read as json: "),
    ("d.jsonl", "[1, 2]", {}, "row 1 is no JSON object"),
    ("d.jsonl.gz", "not compressed", {}, "cannot be read as jsonl: "),
    ("d.jsonl.xz", "not compressed", {}, "cannot be read as jsonl: "),
    ("d.parquet", "not parquet", {}, "cannot be read as parquet: "),
    ("d.csv", "text,label\na,0\nb,c,1\n", {}, "cannot be read as csv: "),
    ("d.jsonl", QA, {"text": "answers"}, "has a dict in column 'answers', where a text or a number is expected"),
    ("d.jsonl", QA, {"group_by": "answers"}, "has a dict in column 'answers', where a text or a number is expected"),
    ("d.jsonl", QA, {"validation": "d.txt"}, "data.validation 'd.txt' has no known format; a file ends in .jsonl, "),
    ("toy", "", {"validation": "test"}, "data.source toy has no other split; remove data.validation"),
    ("nowhere/d.csv", None, {}, "data.source 'nowhere/d.csv' does not exist; give a file (from /"),
]


@pytest.mark.parametrize(("name", "content", "data", "told"), REFUSED)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | None, data: dict[str, str], told: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.txt").write_text("")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as caught:
        rows(name, **data)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_quotation_mark_in_a_tsv_is_a_letter(tmp_path: Path):
    texts = ['"Good film , he said .', "A plain row", 'an awful film"', "nice"]
    (tmp_path / "d.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(texts)))
    assert [row["text"] for row in rows(tmp_path / "d.tsv")] == texts


def test_a_group_on_both_sides_of_given_rows_is_refused_and_equal_rows_are_counted(caplog: pytest.LogCaptureFixture):
    train = [{"text": "a", "film": 1}, {"text": "b", "film": 2}]
    with pytest.raises(ValueError, match="data.group_by film: 1 of its values are in data.validation and in the"):
        check_apart(train, [{"text": "c", "film": 2}], "film")
    with caplog.at_level(logging.WARNING):
        check_apart(train, [{"text": "b", "film": 3}, {"text": "c", "film": 3}], "film")
    assert "1 of 2 validation rows stand among the training rows" in caplog.text


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A Hub that holds one data set; the list of what it was asked."""
    asked = []
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "idx": datasets.Value("int8"),
        }
    )
    content = datasets.Dataset.from_list([{**row, "idx": 1} for row in ROWS], features=features)

    def load_dataset(source: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((source, config, split))
        if source != "owner/data":
            raise FileNotFoundError(f"{source} is not there\nand more")
        return content

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "why_not_on_hub", lambda name, kind: None)
    return asked


def test_the_hub_gives_rows_and_class_names(hub: list[tuple[Any, ...]]):
    section = DataSection(source="owner/data", config="c", split="train", validation="dev")
    train, held, names = load_rows(section)
    assert train == held == ROWS
    assert names == ["neg", "pos"]
    assert hub == [("owner/data", "c", "train"), ("owner/data", "c", "dev")]


@pytest.mark.usefixtures("hub")
def test_what_the_hub_lacks_is_one_line():
    with pytest.raises(
        ValueError, match="'owner/other' cannot be loaded from the Hub: owner/other is not there and more"
    ):
        rows("owner/other")
    with pytest.raises(ValueError, match="owner/data has no column 'body' .row 1.; its columns are text, label, idx"):
        rows("owner/data", text="body")


def test_a_name_that_the_hub_has_not_is_told_without_its_client(hub: list[tuple[Any, ...]], monkeypatch):
    monkeypatch.setattr(sources, "why_not_on_hub", lambda name, kind: f"the Hub has no {kind} {name}")
    with pytest.raises(ValueError, match=r"and the Hub has no dataset reviewz; did you mean 'reviews'\?$"):
        rows("reviewz")
    assert hub == []


@pytest.mark.parametrize("content", ["text,label\na,0,\n", "text,label,,\na,0,,\n"])
def test_empty_cells_that_spreadsheets_add_at_the_end_are_passed_over(tmp_path: Path, content: str):
    (tmp_path / "d.csv").write_text(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert rows(tmp_path / "d.csv") == [{"text": "a", "label": "0"}]


def test_bytes_are_no_text(tmp_path: Path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"a", b"b"], "label": [0, 1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 1 of .* has a bytes in column 'text'"):
        rows(tmp_path / "a.parquet")


def test_texts_that_look_like_dates_or_numbers_stay_texts(tmp_path: Path):
    (tmp_path / "d.jsonl").write_text('{"text": "2021-01-01", "label": 1}')
    assert rows(tmp_path / "d.jsonl") == [{"text": "2021-01-01", "label": 1}]
    (tmp_path / "d.csv").write_text("text,label\n007,1\n")
    assert rows(tmp_path / "d.csv") == [{"text": "007", "label": "1"}]


def test_a_cell_may_hold_a_book(tmp_path: Path):
    book = "a word " * 20_000
    (tmp_path / "d.csv").write_text(f"text,label\n{book},1\n")
    assert rows(tmp_path / "d.csv") == [{"text": book, "label": "1"}]

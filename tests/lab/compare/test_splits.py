"""Training, tuning and reported rows: apart, the same for every job, and fit for the metric."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path

import pytest
from datasets import Dataset

from pedyra.app.recipe_sections import DataSection
from pedyra.lab.compare.prepare import split_task

GROUPED = DataSection(source="toy", group_by="group", validation_fraction=0.25)


def texts(file: str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def write(path: Path, labels: list[int]) -> str:
    path.write_text("".join(json.dumps({"text": f"row {i}", "label": label}) + "\n" for i, label in enumerate(labels)))
    return str(path)


def test_no_group_is_on_two_sides(tmp_path):
    splits = split_task("toy", GROUPED, None, tmp_path)
    files = {
        "train": splits["jobs"]["source"],
        "reported": splits["jobs"]["validation"],
        "tuning-train": splits["tuning"]["source"],
        "tuning": splits["tuning"]["validation"],
    }
    groups = {name: {row["group"] for row in texts(file)} for name, file in files.items()}
    assert groups["train"] == groups["tuning-train"] | groups["tuning"]
    assert not groups["train"] & groups["reported"] and not groups["tuning-train"] & groups["tuning"]
    # 32 groups of 16 rows: a quarter is reported, then a tenth of the 24 others judges tuning runs.
    assert {name: len(rows) for name, rows in groups.items()} == {
        **{"train": 24, "reported": 8},
        **{"tuning-train": 21, "tuning": 3},
    }


def test_the_given_validation_is_reported_and_tuning_comes_off_the_training_rows(tmp_path):
    train, validation = write(tmp_path / "a.jsonl", [0, 1] * 20), write(tmp_path / "b.jsonl", [1, 0, 1])
    splits = split_task("mine", DataSection(source=train, validation=validation), None, tmp_path / "out")
    assert [row["label"] for row in texts(splits["jobs"]["validation"])] == [1, 0, 1]
    assert len(texts(splits["jobs"]["source"])) == 40
    assert (len(texts(splits["tuning"]["source"])), len(texts(splits["tuning"]["validation"]))) == (36, 4)


def test_the_split_is_made_once_and_can_be_moved(tmp_path):
    path = write(tmp_path / "rows.jsonl", [0, 1] * 20)
    data = DataSection(source=path)
    first = texts(split_task("mine", data, None, tmp_path / "a")["jobs"]["source"])
    (tmp_path / "rows.jsonl").unlink()  # what is split is kept
    (tmp_path / "a").rename(tmp_path / "b")
    again = split_task("mine", data, None, tmp_path / "b")
    assert again["jobs"]["source"] == str(tmp_path / "b" / "train.jsonl")
    assert texts(again["jobs"]["source"]) == first


def test_a_folder_with_other_rows_is_refused(tmp_path):
    split_task("toy", GROUPED, None, tmp_path / "a")
    with pytest.raises(ValueError, match="a holds other rows: eval_rows was None and is now 5; choose another"):
        split_task("toy", GROUPED.model_copy(update={"eval_rows": 5}), None, tmp_path / "a")


@pytest.mark.parametrize("changed", ["train.jsonl", "held.jsonl"])
def test_a_file_that_has_changed_since_it_was_split_is_told(tmp_path, changed):
    files = {name: write(tmp_path / name, [0, 1] * 20) for name in ("train.jsonl", "held.jsonl")}
    data = DataSection(source=files["train.jsonl"], validation=files["held.jsonl"])
    split_task("mine", data, None, tmp_path / "a")
    split_task("mine", data, None, tmp_path / "a")
    write(tmp_path / changed, [0, 1] * 19 + [1, 1])
    with pytest.raises(ValueError, match=f"{changed} has changed since .*a was made of it; choose another output_dir"):
        split_task("mine", data, None, tmp_path / "a")


def test_the_classes_are_told_where_a_part_of_the_rows_may_lack_one(tmp_path):
    path = write(tmp_path / "three.jsonl", [0, 1] * 20 + [2])
    splits = split_task("three", DataSection(source=path), None, tmp_path / "out")
    assert splits["tuning"]["labels"] == splits["jobs"]["labels"] == ["0", "1", "2"]
    named = DataSection(source=path, labels=["a", "b", "c"])
    assert split_task("named", named, None, tmp_path / "named")["tuning"]["labels"] == ["a", "b", "c"]


def test_dates_and_decimals_of_a_table_are_rows_too(tmp_path):
    """As `pedyra train` takes them."""
    days = [datetime.date(2026, 11, 1 + number % 20) for number in range(60)]
    rows = [{"text": f"text {n}", "label": Decimal(n % 2), "day": day} for n, day in enumerate(days)]
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    data = DataSection(source=str(tmp_path / "d.parquet"), group_by="day")
    splits = split_task("dated", data, None, tmp_path / "out")
    train, reported = (texts(splits["jobs"][key]) for key in ("source", "validation"))
    assert len(train) + len(reported) == 60
    assert {row["day"] for row in train}.isdisjoint(row["day"] for row in reported)
    assert all(int(row["label"]) == int(row["text"].split()[1]) % 2 for row in train)

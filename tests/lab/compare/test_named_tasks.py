"""Named tasks are the GLUE tasks as published, from the Hub or from local files."""

from __future__ import annotations

import json

import pytest

from pedyra.app.recipe import check_recipe
from pedyra.lab.compare.named_tasks import GLUE, NAMES, task_data

# Wang et al. 2019, Table 1: task -> (kind, metric).
OFFICIAL = {
    "cola": ("classification", "matthews"),
    "sst2": ("classification", "accuracy"),
    "mrpc": ("pairs", "accuracy"),
    "qqp": ("pairs", "accuracy"),
    "stsb": ("regression", "pearson"),
    "mnli": ("pairs", "accuracy"),
    "qnli": ("pairs", "accuracy"),
    "rte": ("pairs", "accuracy"),
}


def test_the_eight_glue_tasks_have_their_official_metrics():
    assert {name: (task["kind"], task["metric"]) for name, task in GLUE.items()} == OFFICIAL


@pytest.mark.parametrize("name", NAMES)
def test_every_named_task_is_a_valid_data_section(name):
    data = task_data(name, None, None)
    check_recipe({"name": "x", "model": {"name": "tiny-bert"}, "data": data}, name)


def test_mnli_is_judged_on_the_matched_set():
    assert task_data("mnli", None, None)["validation"] == "validation_matched"
    assert task_data("rte", None, None)["validation"] == "validation"


def test_gsm8k_trains_on_answers_and_holds_out_its_test_split(tmp_path):
    hub = task_data("gsm8k", None, None)
    assert (hub["source"], hub["config"], hub["validation"]) == ("openai/gsm8k", "main", "test")
    local = task_data("gsm8k", {"max_length": 160}, str(tmp_path))
    assert local["source"] == str(tmp_path / "gsm8k" / "train.jsonl.gz")
    assert local["validation"] == str(tmp_path / "gsm8k" / "test.jsonl.gz")
    assert local["kind"] == "causal_lm" and local["completion"] == "answer" and local["max_length"] == 160


def test_local_files_are_found_by_task_and_split(tmp_path):
    (tmp_path / "cola").mkdir()
    (tmp_path / "cola" / "train.jsonl").write_text(json.dumps({"sentence": "a", "label": 1}))
    data = task_data("cola", {"train_rows": 5}, str(tmp_path))
    assert data["source"] == str(tmp_path / "cola" / "train.jsonl")
    assert data["validation"] == str(tmp_path / "cola" / "validation.jsonl.gz")  # not there: compressed is expected
    assert data["train_rows"] == 5 and data["metric"] == "matthews"


def test_a_label_can_be_another_name_and_another_folder(tmp_path):
    data = task_data("short", {"task": "qnli", "folder": "qnli_small"}, str(tmp_path))
    assert data["source"] == str(tmp_path / "qnli_small" / "train.jsonl.gz")
    assert data["text"] == "question"


def test_a_source_makes_a_task_of_its_own():
    settings = {"source": "mine.jsonl", "kind": "causal_lm", "prompt": "q", "completion": "a"}
    assert task_data("cola", settings, None) == settings

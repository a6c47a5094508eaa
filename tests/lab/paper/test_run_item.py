"""`pedyra paper run` at scale smoke: every id comes to its numbers, its files, and, for a figure, its picture."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from pedyra.app.recipe_sections import GenerateSection
from pedyra.lab.paper.item import get_item, items
from pedyra.lab.paper.places import Places
from pedyra.lab.paper.run_item import measurements, run_item, with_generated


@pytest.mark.parametrize("name", items())
def test_every_id_runs_at_scale_smoke(name, smoke):
    item, outcome = get_item(name), smoke(name)
    assert not outcome.failed
    measured = {(row["row"], row["column"]) for row in outcome.results if row["measured"] is not None}
    assert {(cell.row, cell.column) for cell in item.cells("smoke")} <= measured
    assert len(outcome.results) == len(item.rows) * len(item.at("smoke").columns)
    suffixes = ["md", "jsonl", *(["svg", "png"] if item.is_figure else [])]
    assert [file.name for file in outcome.files] == [f"{name}.{suffix}" for suffix in suffixes]
    assert all(file.stat().st_size for file in outcome.files)


def test_the_same_command_again_runs_nothing_and_says_the_same(smoke, monkeypatch):
    before = smoke("table14")

    def ran(jobs, *_):
        assert not jobs

    monkeypatch.setattr("pedyra.lab.compare.compare.run_jobs", ran)
    again = run_item(get_item("table14"), "smoke", before.files[0].parents[2], Places())
    assert again.results == before.results
    table = before.files[1].read_text()
    part = run_item(get_item("table14").only(columns=["k=4", "k=12"]), "smoke", before.files[0].parents[2], Places())
    assert len(part.results) < len(before.results) and before.files[1].read_text() == table
    assert part.files[1] == before.files[1].parent / "part" / "table14.jsonl" and part.files[1].is_file()


@pytest.mark.parametrize("error", [ValueError, OSError, torch.OutOfMemoryError])
def test_a_run_that_cannot_be_asked_to_write_leaves_the_table_to_the_others(error, smoke, monkeypatch):
    before, asked = smoke("table14"), []

    def write(row, *_):
        asked.append(row["run"])
        if len(asked) == 1:
            raise error("no test set")
        return row

    monkeypatch.setattr("pedyra.lab.paper.run_item.with_generated", write)
    again = run_item(get_item("table14"), "smoke", before.files[0].parents[2], Places())
    assert again.failed == [f"{asked[0]}: no test set"] and len(asked) > 1
    assert again.results == before.results  # which need no writing


def test_runs_are_shared_between_items(smoke):
    smoke("figure11")  # has the paper's method on table14's recipe
    runs = smoke("table14").files[0].parents[1] / "runs"
    assert len(list(runs.glob("smoke_encoder_r4/jobs/pedyra/**/metrics.jsonl"))) == 1


def test_tiny_models_stand_beside_no_published_number_nor_under_a_published_data_set(smoke):
    folder = smoke("table14").files[0].parent
    rows = [json.loads(line) for line in (folder / "table14.jsonl").read_text().splitlines()]
    keys = {"id", "row", "column", "published", "measured", "standard_error", "seeds", "scale"}
    assert keys <= set(rows[0])
    one = next(row for row in rows if (row["row"], row["column"]) == ("toy (Acc.)", "k=12"))
    assert one["published"] is None and 0 <= one["measured"] <= 100 and one["seeds"] == 1
    assert one["learning_rate"] == 1e-2  # of the recipe smoke_encoder
    text = (folder / "table14.md").read_text()
    assert "95.98" not in text and "SST-2" not in text and "The paper's claim: Of 4, 8, 12 and 24 triples" in text


def test_only_the_test_sets_that_are_asked_for_are_answered_and_each_once(tmp_path, monkeypatch):
    calls = []

    def evaluate(run, *, generate, **_):
        calls.append(set(generate))
        return {name: 0.25 for name in generate}

    monkeypatch.setattr("pedyra.app.runs.evaluate.evaluate_run", evaluate)
    row = {"run": str(tmp_path), "metrics": {"loss": 1.0}}
    for columns in (["HumanEval"], ["HumanEval", "MBPP+"], ["HumanEval"]):
        (each,) = measurements(get_item("table6").only(columns=columns), "small", tmp_path / "out", Places())
        result = with_generated(row, each, allow_code_execution=True)
        assert result["metrics"]["humaneval"] == 0.25 and result["metrics"]["loss"] == 1.0
    assert calls == [{"humaneval"}, {"mbppplus"}]
    assert each.recipe.generate["humaneval"].rows == 20
    asked = each.recipe.generate | {"humaneval": GenerateSection(rows=21)}
    other = replace(each, recipe=each.recipe.model_copy(update={"generate": asked}))
    with_generated(row, other, allow_code_execution=True)  # as the recipe asks now
    assert calls[2:] == [{"humaneval"}]


def test_a_set_whose_file_has_changed_is_answered_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "pedyra.app.runs.evaluate.evaluate_run", lambda run, **_: calls.append(run) or {"humaneval": len(calls)}
    )
    for task in ("codealpaca", "humaneval"):
        (tmp_path / task).mkdir()
    file = tmp_path / "humaneval" / "test.jsonl"
    file.write_text("{}\n")
    (each,) = measurements(
        get_item("table6").only(columns=["HumanEval"]), "small", tmp_path / "out", Places(data_dir=tmp_path)
    )
    row = {"run": str(tmp_path), "metrics": {}}
    result = [with_generated(row, each, allow_code_execution=True)["metrics"]["humaneval"] for _ in range(2)]
    assert result == [1, 1]
    file.write_text("{}\n{}\n")
    assert with_generated(row, each, allow_code_execution=True)["metrics"]["humaneval"] == 2


def test_a_run_is_given_the_test_sets_that_are_asked_for_and_no_others(tmp_path):
    """A run reads them before it trains."""
    item = get_item("table6")
    for columns, names in ((["HumanEval"], {"humaneval"}), (["MBPP", "MBPP+"], {"mbpp", "mbppplus"})):
        (each,) = measurements(item.only(columns=columns), "small", tmp_path / "out", Places())
        assert each.grid.generate.keys() == names

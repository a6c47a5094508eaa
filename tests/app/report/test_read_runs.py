"""What is read from a run folder, and how a damaged one is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pedyra.app.report.records import make_layers, read_run


@pytest.fixture
def copy(dynamic_run: Path, fitted_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(fitted_run / "fit", tmp_path / "copy" / "fit")
    return Path(shutil.copytree(dynamic_run, tmp_path / "copy", dirs_exist_ok=True))


def edit_line(path: Path, number: int, change: Callable[[str], str]) -> None:
    lines = path.read_text().splitlines()
    place = number - 1 if number > 0 else number
    lines[place] = change(lines[place])
    path.write_text("\n".join(lines) + "\n")


def without(key: str) -> Callable[[str], str]:
    return lambda line: json.dumps({name: value for name, value in json.loads(line).items() if name != key})


def test_a_run_is_read_whole(dynamic_run: Path):
    run = read_run(dynamic_run)
    assert len(run.layers) == 36
    assert len(run.adjustments) == 20
    assert run.final["metric"] == "accuracy" and not any(record.get("final") for record in run.metrics)
    assert run.layers[1].short_name == "key 0"
    assert run.final_ranks == run.adjustments[-1]["ranks"]


def test_the_adapter_of_a_run_is_pointed_to_its_run(copy: Path):
    (copy / "adapter").mkdir()
    with pytest.raises(ValueError, match=f"adapter is a part of a run; give the run folder, {copy}$"):
        read_run(copy / "adapter")


def test_a_plain_lora_run_has_no_layers(lora_run: Path):
    run = read_run(lora_run)
    assert run.layers == [] and run.snapshots == [] and run.final_ranks == {}


def test_places_and_short_names_of_layers():
    rows = [
        {"name": "h.3.mlp.up", "type": "up", "depth": 3, "rank": 8},
        {"name": "pooler.dense", "type": "pooler.dense", "depth": 0, "rank": 8},
        *({"name": f"h.4.experts.{i}.up", "type": "up", "depth": 4, "rank": 8} for i in range(2)),
    ]
    found = [(layer.depth, layer.short_name) for layer in make_layers(rows)]
    assert found == [(3, "up 3"), (None, "pooler.dense"), (4, "h.4.experts.0.up"), (4, "h.4.experts.1.up")]


def test_of_a_step_written_twice_by_a_resume_the_later_line_counts(copy: Path):
    ranks = copy / "ranks.jsonl"
    again = json.loads(ranks.read_text().splitlines()[-1])
    again["total_rank"] = 1
    ranks.write_text(ranks.read_text() + json.dumps(again) + "\n")
    run = read_run(copy)
    assert [s["total_rank"] for s in run.snapshots if s["step"] == again["step"]] == [1]


def cut(line: str) -> str:
    return line[: len(line) // 2]


@pytest.mark.parametrize(
    ("file", "number", "change", "told"),
    [
        ("metrics.jsonl", 3, cut, "metrics.jsonl, line 3 is damaged"),
        ("metrics.jsonl", 4, without("step"), "metrics.jsonl, line 4: step is nothing"),
        ("ranks.jsonl", 5, cut, "ranks.jsonl, line 5 is damaged"),
        ("ranks.jsonl", 2, without("kind"), "ranks.jsonl, line 2: kind is nothing"),
        ("recipe.yaml", 3, lambda line: "a: b: c", "recipe.yaml"),
        ("environment.json", 1, cut, "environment.json"),
    ],
)
def test_damage_is_told_with_file_and_line(copy: Path, file: str, number: int, change, told: str):
    edit_line(copy / file, number, change)
    with pytest.raises(ValueError) as raised:
        read_run(copy)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("file", "told"),
    [("recipe.yaml", "recipe.yaml' does not exist"), ("metrics.jsonl", "metrics.jsonl is missing or empty")],
)
def test_what_is_missing_is_told(copy: Path, file: str, told: str):
    (copy / file).unlink()
    with pytest.raises(ValueError, match=told):
        read_run(copy)

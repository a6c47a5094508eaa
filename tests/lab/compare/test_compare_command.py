"""`pedyra compare` on the command line: the shipped smoke grid with real runs, and mistakes in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pedyra.lab.cli import main

RECIPES = Path(__file__).parents[3] / "recipes"
SMOKE = str(RECIPES / "compare_smoke.yaml")


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call(*arguments): exit code, stdout and stderr of one `pedyra compare` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["compare", *arguments])
        code = stopped.value.code
        return (0 if code is None else code, *capsys.readouterr())

    return run


@pytest.mark.slow
def test_a_grid_from_nothing_to_its_tables(call, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    code, out, err = call(SMOKE, "methods=[lora, randlora]", "seeds=[0]", "--json", "rows.jsonl", "--workers", "2")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["method"], row["task"], row["metric"]) for row in rows] == [
        ("lora", "toy", "accuracy"), ("randlora", "toy", "accuracy"),
    ]  # fmt: skip
    lora, randlora = (row["trainable_parameters"] for row in rows)
    assert abs(randlora / lora - 1) <= 0.05
    for suffix in ("md", "jsonl"):
        assert (tmp_path / "runs/compare_smoke" / f"comparison.{suffix}").stat().st_size > 0
    assert "Difference to lora" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.yaml"], "grid 'absent.yaml' does not exist"),
        ([SMOKE, "seeds=[]"], "seeds is []: List should have at least 1 item"),
        ([SMOKE, "methods.dora={}"], "method dora cannot match the baseline's"),
        ([SMOKE, "tasks.toy.text=txt"], "no column 'txt'"),
        ([SMOKE, "tasks.mine={source: a.jsonl, folder: x}"], "tasks.mine: unknown key 'data.folder'"),
        ([SMOKE, "training.max_stepz=4"], "methods.lora on toy: training.max_stepz is no argument"),
        ([SMOKE, "tasks.toy.metric=pearson"], "data.metric pearson is no metric of data.kind classification"),
        ([SMOKE, "tasks={cola: {}}", "data_dir=nowhere"], "nowhere/cola/train.jsonl.gz' does not exist"),
        ([SMOKE, "model.name=absent/model", "tasks.toy.text=text"], "model.name 'absent/model' is no folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(call, arguments, message):
    code, _, err = call(*arguments)
    assert code == 2
    assert err.startswith("Error: ") and err.count("\n") == 1 and message in err, err

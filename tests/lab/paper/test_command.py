"""`pedyra paper` on the command line: what is here, and mistakes told in one line before any work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pedyra.lab.cli import main
from pedyra.lab.paper import places
from pedyra.lab.paper.item import SCALES, get_item, items
from pedyra.lab.paper.places import Places
from pedyra.lab.paper.run_item import run_item


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr(places, "why_not_on_hub", lambda name, kind: "there is no Hub in a test")
    places.why_no_model.cache_clear()
    places.why_no_data.cache_clear()


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["paper", *arguments])
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_list_tells_what_each_id_needs_and_what_is_here(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["paper", "list", "--json", str(tmp_path / "rows.jsonl")])
    assert not ended.value.code
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["id"], row["scale"]) for row in rows] == [(name, scale) for name in items() for scale in SCALES]
    by_scale = {row["scale"]: row for row in rows if row["id"] == "table4"}
    assert by_scale["smoke"]["here"] and not by_scale["full"]["here"]
    assert by_scale["full"]["model"] == ["facebook/bart-large"] and by_scale["full"]["data"] == ["EdinburghNLP/xsum"]
    assert "not here" in capsys.readouterr().out


def test_what_is_missing_is_told_with_how_to_give_it(capsys, tmp_path):
    told = refusal(capsys, "run", "table4", "--out", str(tmp_path / "out"))
    assert "table4 at scale full needs what is not here: model facebook/bart-large: there is no Hub in a test" in told
    assert "give a copy with --model NAME=PATH; data DIR/xsum/train.jsonl.gz" in told
    assert not (tmp_path / "out").exists()


def test_a_folder_of_data_and_a_copy_of_a_model_are_taken(tmp_path):
    (tmp_path / "xsum").mkdir()
    for split in ("train", "test"):
        (tmp_path / "xsum" / f"{split}.jsonl").write_text("{}\n")
    here = Places.parse(tmp_path, [f"facebook/bart-large={tmp_path}"])
    assert here.missing(get_item("table4"), "full") == []
    resolved = here.resolve("xsum")
    assert resolved.model.name == str(tmp_path) and resolved.data.validation == str(tmp_path / "xsum" / "test.jsonl")
    assert resolved.data.prompt == "document" and resolved.lora.r == 4


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tabel2"], "did you mean 'table2'"),
        (["table4", "--model", "bart"], "--model is 'bart'; it is NAME=PATH"),
        (["table4", "--data-dir", "nowhere"], "--data-dir nowhere is no folder"),
        (
            ["table4", "--model", "facebook/bart-lage=X"],
            "no recipe trains 'facebook/bart-lage'; did you mean 'facebook",
        ),
        (["table2", "--column", "MNLI"], "table2 measures no such cell at scale smoke"),
        (["table13", "--row", "STS-B, LoRA"], "table13 measures no such cell at scale smoke"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(arguments, told, capsys, tmp_path):
    assert told in refusal(capsys, "run", *arguments, "--scale", "smoke", "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_models_programs_are_not_run_without_leave(monkeypatch):
    monkeypatch.setattr(places, "why_not_on_hub", lambda name, kind: None)
    monkeypatch.setattr(places, "why_not_offline", lambda name, kind: None)
    with pytest.raises(ValueError, match="runs programs that a model wrote .humaneval, .*--allow-code-execution"):
        Places().check(get_item("table6"), "full", allow_code_execution=False)
    made: list[str] = []
    monkeypatch.setattr("pedyra.app.tasks.sandbox.Sandbox", lambda: made.append("sandbox"))
    Places().check(get_item("table6"), "full", allow_code_execution=True)
    assert made == ["sandbox"]


def test_where_there_is_no_sandbox_nothing_is_trained(monkeypatch, tmp_path):
    def none():
        raise ValueError("no sandbox here")

    monkeypatch.setattr(places, "why_not_on_hub", lambda name, kind: None)
    monkeypatch.setattr(places, "why_not_offline", lambda name, kind: None)
    monkeypatch.setattr("pedyra.app.tasks.sandbox.Sandbox", none)
    with pytest.raises(ValueError, match="no sandbox here"):
        run_item(get_item("table6"), "full", tmp_path / "out", Places(), allow_code_execution=True)
    assert not (tmp_path / "out").exists()


def test_offline_what_no_cache_has_is_missing(tmp_path):
    """With HF_HUB_OFFLINE nothing is asked of the Hub, and a list that says yes is one that runs."""
    code = (
        "import sys\nfrom pedyra.lab.cli import main\n"
        "try: main(['paper', 'list', '--json', sys.argv[1]])\n"
        "finally: print(*[m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "COLUMNS": "200"}
    file = str(tmp_path / "rows.jsonl")
    done = subprocess.run([sys.executable, "-c", code, file], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == ""  # in a second, for nothing heavy is imported
    rows = {(row["id"], row["scale"]): row for row in map(json.loads, Path(file).read_text().splitlines())}
    assert (
        rows["table2", "smoke"]["here"] and not rows["table2", "full"]["here"] and not rows["table2", "small"]["here"]
    )
    assert "no cache has it" in " ".join(rows["table6", "full"]["missing"])
    assert any("DIR/humaneval/test.jsonl.gz" in told for told in rows["table6", "full"]["missing"])

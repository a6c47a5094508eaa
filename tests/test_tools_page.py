"""The snippets of docs/tools.md are run: ranks move in them, and the adapter is an ordinary one afterwards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from works_with import note, rows

import pedyra
from pedyra.lora.inspection import inspect_adapter

PAGE = Path(__file__).parents[1] / "docs" / "tools.md"
STEPS = 40


def snippet(title: str) -> str:
    """The Python under a heading."""
    text = PAGE.read_text().split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


@pytest.fixture
def run(make_llama: Any, monkeypatch: Any, tmp_path: Path):
    """run(title, micro): run the snippet on a tiny Llama; its ranks before and after."""
    allocators = []
    original = pedyra.RankAllocator.__init__

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        allocators.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(pedyra.RankAllocator, "__init__", remember)

    def execute(title: str, micro: int = 1) -> tuple[dict[str, int], dict[str, int]]:
        generator = torch.Generator().manual_seed(0)
        tokens = [torch.randint(3, 40, (4, 8), generator=generator) for _ in range(STEPS * micro)]
        rows = [{"input_ids": each, "labels": each} for each in tokens]
        model = make_llama(lora_alpha=24)
        batches = torch.utils.data.DataLoader(rows, batch_size=None)  # pyright: ignore
        exec(compile(snippet(title), f"{PAGE}: {title}", "exec"), {"model": model, "batches": batches})
        (allocator,) = allocators
        assert allocator.step == STEPS
        model.save_pretrained(tmp_path / "adapter")
        saved = {row["layer"]: row["rank"] for row in inspect_adapter(tmp_path / "adapter")[:-1]}
        return allocator.initial_ranks, saved

    return execute


@pytest.mark.parametrize(("title", "micro"), [("A plain loop", 1), ("accelerate", 2)])
def test_a_loop(run: Any, title: str, micro: int):
    before, after = run(title, micro)
    assert sum(before.values()) == sum(after.values()) and before != after
    note("tool", title, "accelerate" if title == "accelerate" else None, run="works")


@pytest.mark.filterwarnings("ignore")  # of Lightning, about workers and loggers
def test_lightning(run: Any, tmp_path: Path, monkeypatch: Any):
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    before, after = run("Lightning")
    assert sum(before.values()) == sum(after.values()) and before != after
    note("tool", "Lightning", "lightning", run="works")


NOT_RUN = {
    "LLaMA-Factory": "0.9.5 takes peft 0.18 at most, and pedyra takes 0.19 at least",
    "unsloth": "it needs a GPU",
}


@pytest.mark.parametrize("title", NOT_RUN)
def test_what_is_not_run_is_at_least_python(title: str):
    compile(snippet(title), title, "exec")
    note("tool", title, run=f"not run here: {NOT_RUN[title]}")


def test_the_docs_have_a_row_of_every_tool():
    trackers = {"TensorBoard", "W&B, offline", "MLflow", "trackio"}
    known = {"A plain loop", "accelerate", "Lightning", "axolotl", *NOT_RUN, *trackers}
    assert {row["name"] for row in rows() if row["kind"] == "tool"} == known, "run: make works-with"

"""The examples run, and rank adaptation really happens in them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*arguments)


def test_own_loop_moves_ranks_at_a_constant_budget():
    allocator = run("own_loop")
    assert len(allocator.history) >= 4
    assert allocator.parameters <= allocator.initial_parameters
    assert any(record["pruned"] and record["added"] for record in allocator.history)


def test_trainer_moves_ranks_and_writes_a_plain_adapter(tmp_path: Path):
    callback = run("trainer", str(tmp_path))
    assert set(callback.allocator.ranks.values()) != {4}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # read by TRL
def test_sft_trainer_moves_ranks_and_writes_a_plain_adapter(tmp_path: Path):
    pytest.importorskip("trl", reason="needs pedyra[sft]")
    callback = run("sft_trainer", str(tmp_path))
    assert set(callback.allocator.ranks.values()) != {4}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()

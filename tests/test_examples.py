"""The examples run, and rank adaptation really happens in them."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest

from pedyra import RankConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
WILLING = RankConfig.paper(moves=4)
"""By default nothing moves in 60 steps: no gain is beyond chance. The paper's method moves whether or not it helps."""


def run(name: str, *arguments: Any):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*arguments)


def test_own_loop_moves_ranks_at_a_constant_budget():
    allocator = run("own_loop")
    assert len(allocator.history) >= 4
    assert allocator.parameters <= allocator.initial_parameters
    assert any(record["pruned"] and record["added"] for record in allocator.history)


def test_trainer_moves_ranks_and_writes_a_plain_adapter(tmp_path: Path):
    callback = run("trainer", str(tmp_path), WILLING)
    assert set(callback.allocator.ranks.values()) != {4}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_by_default_nothing_moves_in_a_run_too_short_to_measure(tmp_path: Path):
    allocator = run("trainer", str(tmp_path)).allocator
    assert allocator.settled and set(allocator.ranks.values()) == {4}
    for record in allocator.history:
        chance = math.inf if record["chance"] is None else record["chance"]
        assert all(mean < chance * error for mean, error, _ in record["gains"].values())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # read by TRL
def test_sft_trainer_moves_ranks_and_writes_a_plain_adapter(tmp_path: Path):
    pytest.importorskip("trl", reason="needs pedyra[sft]")
    callback = run("sft_trainer", str(tmp_path), WILLING)
    assert set(callback.allocator.ranks.values()) != {4}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()

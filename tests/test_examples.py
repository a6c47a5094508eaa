"""The examples run, and rank adaptation really happens in them."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from pedyra import RankConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALLER = RankConfig(target_rank=1)
"""In 60 steps nothing is proved, and by default everything is kept; a size that is given is met."""


def run(name: str, *arguments: Any):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*arguments)


def test_own_loop_ends_with_less_than_it_began_with():
    allocator = run("own_loop")
    totals = [24, *(sum(record["ranks"].values()) for record in allocator.history)]
    assert totals == sorted(totals, reverse=True) and 0 < totals[-1] < 24
    assert allocator.history[-1]["fit"]["words"].startswith("flat: r = 8 is ")


def test_trainer_ends_at_the_size_and_writes_a_plain_adapter(tmp_path: Path):
    allocator = run("trainer", str(tmp_path), SMALLER).allocator
    assert 0.2 * allocator.initial_parameters < allocator.parameters <= allocator.initial_parameters / 4
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # read by TRL
def test_sft_trainer_ends_at_the_size_and_writes_a_plain_adapter(tmp_path: Path):
    pytest.importorskip("trl", reason="needs pedyra[sft]")
    allocator = run("sft_trainer", str(tmp_path), SMALLER).allocator
    assert 0.2 * allocator.initial_parameters < allocator.parameters <= allocator.initial_parameters / 4
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()

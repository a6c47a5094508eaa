"""Processes exchange what docs/processes.md says, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from test_data_parallel import PAPER, by_hand
from together import can_fork, together

pytestmark = pytest.mark.skipif(not can_fork(), reason="forks are for Linux without an accelerator")

LAYERS = [(8, 12), (12, 6), (6, 6)]
"""(in, out) of what `by_hand` trains, at rank 4 to begin with."""


def of_pedyra() -> int:
    """Bytes of a step that PE-DyRA observes: sums of squares per feature, and counts of tokens."""
    return 4 * sum(width + 1 for width, _ in LAYERS)


def of_a_check() -> int:
    """Bytes of comparing the triples of all processes: the least and the most of three sums a layer."""
    return 48 * len(LAYERS)


def counted(rank: int, size: int, settings: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    """Bytes that pedyra itself exchanges in a run by hand of 24 steps, and its history."""
    sent, reduce = [], dist.all_reduce

    def counting(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    history = by_hand(rank, size, settings)["history"]
    return sum(sent), history


def test_what_is_exchanged_is_what_the_formulas_say():
    sent, history = together(counted, 2, PAPER)[0]
    moved = sum(bool(record["pruned"] or record["added"]) for record in history)
    expected = (1 + len(history) + moved) * of_a_check()  # after the first step, at adjustments and after moves
    expected += history[-1]["step"] * of_pedyra()  # 14 steps: an average forgets in 103
    assert moved and sent == expected

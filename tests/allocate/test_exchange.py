"""What is really exchanged is what these formulas count, and docs/scaling.md has their arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch.distributed as dist
from docs_tables import words
from together import can_fork, together

Shapes = Sequence[tuple[int, int]]
"""(in, out) of every adapted layer."""


def gradient_bytes(shapes: Shapes, rank: int) -> int:
    """Of one step: A and B in float32."""
    return 4 * sum(rank * (width + out) for width, out in shapes)


def window_bytes(ranks: Sequence[int]) -> int:
    """Of one step in which the default method measures: three sums and a count of every layer, and the samples."""
    return 4 * (1 + sum(3 * rank * rank + 1 for rank in ranks))


def input_bytes(shapes: Shapes) -> int:
    """Of one step that the paper's method observes: sums of squares per feature, and counts of tokens."""
    return 4 * (sum(width for width, _ in shapes) + len(shapes))


def check_bytes(shapes: Shapes) -> int:
    """Of comparing the triples of all processes: the least and the most of three sums a layer."""
    return 8 * 2 * 3 * len(shapes)


def counted(rank: int, size: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Bytes that pedyra itself exchanges in a run by hand of 24 steps, and its history."""
    sys.path.insert(0, str(Path(__file__).parent / "allocate"))
    from test_data_parallel import by_hand

    sent, reduce = [], dist.all_reduce

    def counting(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    history = by_hand(rank, size, settings)["history"]
    return {"sent": sum(sent), "history": history}


NET = [(8, 12), (12, 6), (6, 6)]
"""What `by_hand` trains."""


@pytest.mark.skipif(not can_fork(), reason="forks are for Linux without an accelerator")
@pytest.mark.parametrize("method", ["default", "paper"])
def test_what_is_exchanged_is_what_the_formulas_say(method):
    settings: Any = {"target_rank": 1, "initial_warmup": 1, "interval": 10, "final_warmup": 2}
    if method == "paper":
        settings = {"interval": 4, "initial_warmup": 2, "final_warmup": 6, "moves": 3, "alpha": 0.5, "start": "lora"}
    found = together(counted, 2, settings)[0]
    history = found["history"]
    moved = sum(bool(record["pruned"] or record["added"]) for record in history)
    expected = (1 + len(history) + moved) * check_bytes(NET)  # after the first step, at adjustments and after moves
    if method == "paper":
        expected += history[-1]["step"] * input_bytes(NET)  # 14 steps: an average forgets in 103
    else:
        for ranks in ([4, 4, 4], *(record["ranks"].values() for record in history[:-1])):
            expected += 10 * window_bytes(list(ranks))
    assert moved and found["sent"] == expected


WIDTH, WIDE, KEYS, BLOCKS, PARAMETERS = 8192, 28672, 1024, 80, 70.6e9
"""Llama 3 70B: width, width of the feed-forward part, of keys and values."""


def linears() -> Shapes:
    """Its linear layers but the head."""
    attention = [(WIDTH, WIDTH), (WIDTH, KEYS), (WIDTH, KEYS), (WIDTH, WIDTH)]
    return [*attention, (WIDTH, WIDE), (WIDTH, WIDE), (WIDE, WIDTH)] * BLOCKS


def test_what_the_page_says_of_a_large_model_is_the_arithmetic_of_the_formulas():
    """LoRA r = 16 in float32, a base in bfloat16, which FSDP2 gathers twice; MB that each of 64 GPUs sends."""
    ring = 2 * 63 / 64  # of an all-reduce; a gather sends half of it
    shapes = linears()
    sent = window_bytes([16] * len(shapes)), input_bytes(shapes), gradient_bytes(shapes, 16), 2 * PARAMETERS
    measured, observed, gradients, base = (f"{ring * each / 1e6:,.0f} MB" for each in sent)
    text = words("scaling")
    assert f"each sends {measured} in a step that measures, or {observed} in one that the paper's method obs" in text
    assert f"beside {gradients} of gradients and, under FSDP2, {base} of a base in bfloat16" in text


def differences() -> Iterator[str]:
    """Measured: the largest difference of a weight update to one process, in float32, at the end of 24 steps."""
    from test_data_parallel import NARROW, PAPER, by_hand, by_trainer, flat
    from test_sharded import by_fully_shard, by_tensor_parallel
    from test_sharded import by_trainer as by_fsdp2_trainer

    yield "| engine | method | 2 processes | 4 processes |"
    yield "| --- | --- | --- | --- |"
    engines = {
        "DDP, own loop": by_hand,
        "DDP, Trainer": by_trainer,
        "FSDP2, own loop": by_fully_shard,
        "FSDP2, Trainer": by_fsdp2_trainer,
        "tensor parallel base, own loop": by_tensor_parallel,
    }
    for engine, work in engines.items():
        for method, settings in (("default", NARROW), ("paper", PAPER)):
            cells = []
            with TemporaryDirectory() as folder:
                given = {
                    size: (f"{folder}/{size}",) if work in (by_trainer, by_fsdp2_trainer) else () for size in (1, 2, 4)
                }
                (alone,) = together(work, 1, settings, *given[1])
                for size in (2, 4):
                    first, *others = together(work, size, settings, *given[size])
                    assert all(other == first for other in others)
                    ranks = [[record["ranks"] for record in each["history"]] for each in (first, alone)]
                    assert ranks[0] == ranks[1]
                    pairs = zip(flat(first["updates"]), flat(alone["updates"]), strict=True)
                    cells.append(f"{max(abs(a - b) for a, b in pairs):.0e}")
            yield f"| {engine} | {method} | {cells[0]} | {cells[1]} |"


if __name__ == "__main__":  # PYTHONPATH=tests:tests/allocate python tests/test_docs_scaling.py
    print(*differences(), sep="\n")

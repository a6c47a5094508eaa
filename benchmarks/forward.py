"""`python -m benchmarks.forward`: what does a lower rank bring where PEFT itself serves an adapter?

All ranks run in one process, one forward pass each in random order, and a ratio is the median over rounds of a rank's
pass by that of the base model, in the same round.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from random import Random
from statistics import median, quantiles
from typing import Annotated

import torch
import typer
from peft import LoraConfig, get_peft_model

from benchmarks.command import JsonFile, Threads, command_line, print_done, several
from benchmarks.models import bench_model
from benchmarks.rows import Row, RowFile

FORWARD_KEY = ("model", "rank", "rounds", "threads")
RANKS = (64, 16, 8, 4)


def forward(
    model: Annotated[str, typer.Option(help="minilm, or a random llama-WIDTHxDEPTH.")] = "minilm",
    ranks: Annotated[list[int] | None, several("--rank", "64, 16, 8, 4", "Of every layer", min=1)] = None,
    rounds: Annotated[int, typer.Option(min=4, help="Forward passes of each rank.")] = 40,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Time a forward pass of a model with adapters of these ranks beside one without, in PEFT."""
    rows = bench_forward(model, ranks or RANKS, rounds)
    print_done(RowFile(json_file, FORWARD_KEY).keep(rows), ["model", "rank", "ratio", "low", "high", "megabytes"])


def bench_forward(model: str, ranks: Sequence[int], rounds: int = 40) -> Iterator[Row]:
    """Yield for each rank the median of its pass by the base model's with its quartiles, and the adapter's size."""
    kind = bench_model(model)
    batch = {name: value for name, value in kind.example().items() if name != "labels"}
    peft = get_peft_model(
        kind.build(),
        LoraConfig(r=1, target_modules="all-linear", exclude_modules=kind.exclude, task_type=kind.task_type),
        adapter_name="rank_0",
    ).eval()
    for rank in ranks:
        peft.add_adapter(
            f"rank_{rank}",
            LoraConfig(
                r=rank, target_modules="all-linear", exclude_modules=kind.exclude, task_type=kind.task_type,
                init_lora_weights=False,
            ),
        )  # fmt: skip
    seconds: dict[int, list[float]] = {rank: [] for rank in (0, *ranks)}
    random = Random(0)
    with torch.inference_mode():
        for turn in range(rounds + 2):  # two to warm up
            for rank in random.sample([*seconds], len(seconds)):
                if rank:
                    peft.set_adapter(f"rank_{rank}")
                began = time.perf_counter()
                if rank:
                    peft(**batch)
                else:
                    with peft.disable_adapter():
                        peft(**batch)
                if turn > 1:
                    seconds[rank].append(time.perf_counter() - began)
    for rank in ranks:
        ratios = [one / base for one, base in zip(seconds[rank], seconds[0], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        count = sum(each.numel() for name, each in peft.named_parameters() if f".rank_{rank}." in name)
        yield {
            "model": model, "rank": rank, "rounds": rounds, "threads": torch.get_num_threads(),
            "ratio": median(ratios), "low": low, "high": high, "megabytes": count * 4 / 1e6,
        }  # fmt: skip


if __name__ == "__main__":
    command_line(forward)

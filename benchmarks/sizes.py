"""`python -m benchmarks.sizes COMPARISON`: a LoRA that is cut to the sizes of smaller ones, against those."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.command import JsonFile, Threads, command_line, print_done, several
from benchmarks.rows import Row, RowFile
from benchmarks.trained import TrainedLora, opened
from pedyra.fitting.cut import cut_factors, cut_to
from pedyra.fitting.recover import distill
from pedyra.fitting.verdict import paired
from pedyra.lora.files import read_rows

SIZES_KEY = ("comparison", "rows", "task", "seed", "rank", "smaller_rank", "recover_steps")
_SHAPE = {"method": str, "task": str, "seed": int, "budget": int, "learning_rate": float, "seconds": float}


def sizes(
    comparison: Annotated[Path, typer.Argument(help="Folder of `pedyra compare` with lora at several budgets.")],
    recoveries: Annotated[
        list[int] | None, several("--recover", "0, 160", "Steps of recovery after the cut", min=0)
    ] = None,
    rows: Annotated[int, typer.Option(min=16, help="To calibrate and to recover with.")] = 1024,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Cut the largest LoRA of a comparison to the size of each smaller one, and compare it with that."""
    file = RowFile(json_file, SIZES_KEY)
    columns = ["task", "seed", "smaller_rank", "recover_steps", "loss", "lora_loss", "lora_less_cut", "seconds"]
    found = file.keep(bench_sizes(comparison, recoveries or (0, 160), rows))
    print_done(found, [*columns, "sweep_seconds"])


def bench_sizes(comparison: Path, recoveries: Sequence[int] = (0, 160), rows: int = 1024) -> Iterator[Row]:
    """Yield a row for each task, seed, smaller rank and number of steps of recovery.

    The largest rank of `lora` in the comparison is cut to the parameters of each smaller one, and recovers for so many
    steps. Both are judged by the mean loss on the same held-out batches, all of those of the comparison. `seconds` are
    of the cut and its recovery, calibration included; `training_seconds` of the run that is cut; `sweep_seconds` of the
    smaller LoRA from the start: its runs at every rate of the grid, and this one.

    Args:
        rows: of training, to calibrate and to recover with, at most.
    """
    if not (comparison / "comparison.jsonl").is_file():
        raise ValueError(f"{comparison} has no comparison.jsonl; it takes a folder of `pedyra compare`")
    found = read_rows(comparison / "comparison.jsonl", _SHAPE | {"run": str})
    loras = [row for row in found if row["method"] == "lora"]
    ranks = sorted({row["budget"] for row in loras})
    if len(ranks) < 2:
        raise ValueError(
            f"{comparison} has LoRAs of {len(ranks)} ranks, and it takes two: run `pedyra compare` with method lora "
            f"and budgets: [1, 2, 4, 8]"
        )
    for row in loras:  # runs are named from the folder on, which may have been moved
        row |= {"run": comparison / row["run"], "data": comparison / "data" / row["task"]}
        opened(row["run"], row["data"])  # what is wrong with one is told before anything is measured
    tuning = read_rows(comparison / "tuning.jsonl", _SHAPE)
    for large in loras:
        if large["budget"] == ranks[-1]:
            same = [row for row in loras if (row["task"], row["seed"]) == (large["task"], large["seed"])]
            for row in _against(large, [row for row in same if row is not large], tuning, recoveries, rows):
                yield {"comparison": str(comparison), "rows": rows, **row}


def _against(
    large: Row, smaller: Sequence[Row], tuning: Sequence[Row], recoveries: Sequence[int], rows: int
) -> Iterator[Row]:
    trained = TrainedLora(large["run"], rows, data=large["data"])
    began = time.perf_counter()
    calibration = trained.calibration
    calibrating = time.perf_counter() - began
    batches = list(trained.training)
    for row in sorted(smaller, key=lambda each: -each["budget"]):
        other = TrainedLora(row["run"], data=row["data"])
        size = trained.ladder.point(trained.ladder.within(other.parameters))
        tuned = [each for each in tuning if all(each[key] == row[key] for key in ("method", "task", "budget"))]
        for steps in recoveries:
            began = time.perf_counter()
            factors = cut_factors(trained.model, calibration, size.ranks)
            if steps:
                factors = distill(trained.judge, factors, batches, steps)
            seconds = calibrating + time.perf_counter() - began
            cut = trained.losses(partial(cut_to, trained.model, factors))
            less = paired(cut, other.whole, trained.weights)
            yield {
                **{key: large[key] for key in ("task", "seed")},
                "rank": large["budget"], "smaller_rank": row["budget"], "recover_steps": steps,
                "parameters": size.parameters, "lora_parameters": other.parameters,
                "loss": trained.mean(cut), "lora_loss": trained.mean(other.whole),
                "whole_loss": trained.mean(trained.whole),
                "lora_less_cut": less.mean, "standard_error": less.error,
                "seconds": seconds, "training_seconds": large["seconds"],
                "sweep_seconds": row["seconds"] + sum(each["seconds"] for each in tuned),
            }  # fmt: skip


if __name__ == "__main__":
    command_line(sizes)

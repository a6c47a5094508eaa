"""`python -m benchmarks.cuts RUN`: trained LoRAs that are cut in different ways to one rank, beside a LoRA of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command import JsonFile, Runs, Threads, command_line, print_done, several
from benchmarks.rows import Row, RowFile
from benchmarks.trained import TrainedLora, opened
from pedyra.fitting.choice import by_singular_values
from pedyra.fitting.cut import cut_factors, cut_to
from pedyra.fitting.paired import paired
from pedyra.fitting.sizes import of_rank
from pedyra.lora.files import read_json

CUTS_KEY = ("run", "way", "rank", "rows", "other")
RANKS = (4, 2, 1)


def cuts(
    runs: Runs,
    ranks: Annotated[list[int] | None, several("--rank", "4, 2, 1", "That every layer keeps", min=1)] = None,
    others: Annotated[
        list[Path] | None, several("--other", "none", "A finished run of a LoRA of one of these ranks")
    ] = None,
    rows: Annotated[int, typer.Option(min=16, help="Of training, to calibrate with.")] = 512,
    held_out: Annotated[int, typer.Option(min=16, help="Rows to measure on, at most.")] = 2048,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Cut trained LoRAs to one rank in different ways, and measure by how much the loss rises with each."""
    file = RowFile(json_file, CUTS_KEY)
    results = file.keep(bench_cuts(runs, ranks or RANKS, others or (), rows, held_out))
    print_done(results, ["run", "rank", "way", "parameters", "increase", "standard_error", "part_of_won", "seconds"])


def bench_cuts(
    runs: Sequence[Path],
    ranks: Sequence[int] = RANKS,
    others: Sequence[Path] = (),
    rows: int = 512,
    held_out: int = 2048,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each run, rank and way: the rise of the held-out loss, in pairs with the whole adapter.

    Ways: `fit`, as `pedyra fit` cuts, balanced directions that make up for what goes; `balanced`, the same directions
    as they are; `singular values` of B A, as PEFT's `convert_to_lora` and other tools cut; `singular values, repaired`;
    and `from the start`, another run, trained at this rank.

    Args:
        others: runs of the same task at one of the ranks.
        rows: of training, to calibrate with, at most.
        held_out: rows to measure on, at most.
    """
    for run in (*runs, *others):
        opened(run)  # what is wrong with one is told before anything is measured
    for run in runs:
        yield from _cuts(run, ranks, others, rows, held_out)


def _cuts(
    run: Path, ranks: Sequence[int], others: Sequence[Path], rows: int, held_out: int
) -> Iterator[dict[str, Any]]:
    lora = TrainedLora(run, rows, held_out)
    base = lora.base_losses()
    gain = paired(lora.whole, base, lora.weights).mean

    def row(
        way: str, rank: int, losses: Sequence[float], parameters: int, seconds: float, other: Path | None = None
    ) -> Row:
        rise = paired(lora.whole, losses, lora.weights)
        return {
            "run": str(run), "way": way, "other": other and str(other), "rank": rank, "rows": rows,
            "parameters": parameters, "loss": lora.mean(losses), "whole_loss": lora.mean(lora.whole),
            "base_loss": lora.mean(base), "increase": rise.mean, "standard_error": rise.error,
            "part_of_won": rise.mean / gain, "seconds": seconds,
        }  # fmt: skip

    began = time.perf_counter()
    measured = lora.calibration
    calibrating = time.perf_counter() - began
    singular = by_singular_values(lora.model, measured)
    ways = {
        "fit": (measured, calibrating),
        "balanced": (replace(measured, repairs=False), calibrating),
        "singular values": (replace(singular, repairs=False), 0.0),
        "singular values, repaired": (singular, calibrating),
    }
    for rank in ranks:
        for way, (calibration, before) in ways.items():
            size = of_rank(calibration, rank)
            began = time.perf_counter()
            factors = cut_factors(lora.model, calibration, size.ranks)
            seconds = before + time.perf_counter() - began
            yield row(way, rank, lora.losses(partial(cut_to, lora.model, factors)), size.parameters, seconds)
    for other in others:
        config = read_json(other / "adapter" / "adapter_config.json")
        if config["r"] in ranks:
            smaller = TrainedLora(other, rows, held_out)
            taken = smaller.parameters, smaller.training_seconds
            yield row("from the start", config["r"], smaller.whole, *taken, other)


if __name__ == "__main__":
    command_line(cuts)

"""`python -m benchmarks.cuts RUN`: trained LoRAs that are cut in different ways to one rank, beside a LoRA of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command import JsonFile, Runs, Threads, command_line, print_done, several
from benchmarks.rows import Row, RowFile
from benchmarks.trained import TrainedLora, opened
from pedyra.fitting.cut import cut_to
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
    print_done(results, ["run", "rank", "way", "parameters", "increase", "standard_error", "part_of_won"])


def bench_cuts(
    runs: Sequence[Path],
    ranks: Sequence[int] = RANKS,
    others: Sequence[Path] = (),
    rows: int = 512,
    held_out: int = 2048,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each run, rank and way: the rise of the held-out loss, in pairs with the whole adapter.

    Ways: `calibrated`, balanced directions that make up for what goes; `singular values` of B A, as PEFT's
    `convert_to_lora` and other tools cut; `singular values, repaired`; `fit`, which takes one of these three as
    `pedyra fit` does (`taken`), and may leave a layer a higher rank; and `from the start`, another run, trained at this
    rank.

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
        way: str, rank: int, losses: Sequence[float], parameters: int, taken: str = "", other: Path | None = None
    ) -> Row:
        rise = paired(lora.whole, losses, lora.weights)
        return {
            "run": str(run), "way": way, "taken": taken, "other": other and str(other), "rank": rank, "rows": rows,
            "parameters": parameters, "loss": lora.mean(losses), "whole_loss": lora.mean(lora.whole),
            "base_loss": lora.mean(base), "increase": rise.mean, "standard_error": rise.error,
            "part_of_won": rise.mean / gain,
        }  # fmt: skip

    for rank in ranks:
        chosen = lora.choice.of_rank(rank)
        sizes = {way: replace(of_rank(each, rank), way=way) for way, each in lora.choice.ways.items()}
        for way, size in {"fit": chosen, **sizes}.items():
            losses = lora.losses(partial(cut_to, lora.model, lora.choice.factors(size)))
            yield row(way, rank, losses, size.parameters, chosen.way if way == "fit" else "")
    for other in others:
        config = read_json(other / "adapter" / "adapter_config.json")
        if config["r"] in ranks:
            smaller = TrainedLora(other, rows, held_out)
            yield row("from the start", config["r"], smaller.whole, smaller.parameters, other=other)


if __name__ == "__main__":
    command_line(cuts)

"""`python -m benchmarks.fresh RUN`: is a fit as right as it says, on rows that nobody has seen?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from scipy.stats import beta

from benchmarks.command import JsonFile, Threads, command_line, print_rows
from benchmarks.rows import Row, RowFile
from benchmarks.trained import BATCH, TrainedLora
from pedyra.app.console import new_console
from pedyra.errors import UserError
from pedyra.fitting.cut import cut_to
from pedyra.fitting.fit import Rows, fit_batches
from pedyra.fitting.modes import disabled, evaluating
from pedyra.fitting.paired import paired
from pedyra.fitting.request import FitRequest

FRESH_KEY = ("run", "fit", "rows", "truth")
TRUTH_BATCH = 64
"""Rows of a batch of the truth, which takes most of the time."""


def fresh(
    run: Annotated[Path, typer.Argument(help="A finished run of a LoRA.", show_default=False)],
    fits: Annotated[int, typer.Option(min=2, help="Fits, each of its own rows.")] = 40,
    rows: Annotated[int, typer.Option(min=64, help="Rows that calibrate a fit, and as many held out.")] = 1024,
    truth: Annotated[int, typer.Option(min=64, help="Other rows, that say what is true.")] = 8000,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Fit a LoRA again and again, each time on fresh rows, and count how often what it took is beyond tolerance."""
    results = list(RowFile(json_file, FRESH_KEY).keep(bench_fresh(run, fits, rows, truth)))
    print_rows(results, ["fit", "rank", "measured", "true", "true_error", "tolerance", "covered"])
    new_console().print(summary(results))


def bench_fresh(run: Path, fits: int = 40, rows: int = 1024, truth: int = 8000) -> Iterator[Row]:
    """Yield a row for each fit: the rank that it took, and by how much the loss rises with it in truth.

    Rows are those of the run's own data that it was not trained on, since it took a part of them (`data.train_rows`).
    The truth is measured on some of these, the same for all fits, and each fit draws its own from the others.
    """
    lora = TrainedLora(run, held_out=1)
    unseen = lora.unseen()
    order = torch.randperm(len(unseen), generator=torch.Generator().manual_seed(0))
    if len(order) < truth + 2 * rows:
        raise UserError(f"{run} has {len(order)} rows that it was not trained on, and it takes {truth + 2 * rows}")
    lengths = [len(each) for each in unseen["input_ids"]]
    judged = lora.batches_of(unseen, sorted(order[:truth].tolist(), key=lengths.__getitem__), TRUTH_BATCH)
    left = order[truth:]
    weights = [lora.judge.samples(batch) for batch in judged]
    whole = list(lora.judge.losses(judged, partial(evaluating, lora.model)))
    base = list(lora.judge.losses(judged, partial(disabled, lora.model)))
    gain = paired(whole, base, weights)
    for number in range(fits):
        draw = left[torch.randperm(len(left), generator=torch.Generator().manual_seed(1 + number))]
        calibration, held = draw[:rows].tolist(), draw[rows : 2 * rows].tolist()
        parts = [lora.batches_of(unseen, each, BATCH) for each in (calibration, held)]
        fit = fit_batches(lora.judge, Rows(calibration=parts[0], heldout=parts[1]), FitRequest())
        losses = list(lora.judge.losses(judged, partial(cut_to, lora.model, fit.factors)))
        rise, proof = paired(whole, losses, weights), fit.chosen.proof
        measured = proof.rise if proof else None
        low, high = measured.interval() if measured else (0.0, 0.0)
        yield {
            "run": str(run), "fit": number, "rows": rows, "truth": truth,
            "rank": fit.chosen.rank, "of": fit.whole.rank, "share": fit.chosen.share,
            "measured": measured and measured.mean, "lower": low, "upper": high, "accepted_at": fit.tolerance.loss,
            "true": rise.mean, "true_error": rise.error, "tolerance": 0.01 * gain.mean,
            "beyond": fit.chosen.share < 1 and rise.lower() > 0.01 * gain.mean,
            "beyond_as_measured": fit.chosen.share < 1 and rise.mean > 0.01 * gain.mean,
            "covered": low - 1.96 * rise.error <= rise.mean <= high + 1.96 * rise.error,
        }  # fmt: skip


def summary(rows: list[Row]) -> str:
    """How many fits took a size beyond the tolerance, with an exact interval (Clopper and Pearson)."""
    lines = []
    for field, what in (("beyond", "clearly, beyond the error of the truth"), ("beyond_as_measured", "as measured")):
        count, every = sum(row[field] for row in rows), len(rows)
        low = float(beta.ppf(0.025, count, every - count + 1)) if count else 0.0
        high = float(beta.ppf(0.975, count + 1, every - count)) if count < every else 1.0
        lines.append(f"{count} of {every} fits took a size beyond the tolerance, {what} [{low:.1%}, {high:.1%}] (95 %)")
    covered = sum(row["covered"] for row in rows)
    lines.append(f"{covered} of {len(rows)} intervals hold the true rise")
    return "\n".join(lines)


if __name__ == "__main__":
    command_line(fresh)

"""`pedyra bench sizes`: one trained LoRA, cut to the sizes of smaller ones, against those, trained from the start."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pedyra.app.runs.evaluate import finished_run
from pedyra.fitting.calibration import calibrate, evaluating
from pedyra.fitting.curve import Ladder, Shape
from pedyra.fitting.cut import Factors, cut_factors
from pedyra.fitting.recover import distill, replaced
from pedyra.fitting.verdict import paired
from pedyra.lab.bench.rows import Row
from pedyra.lab.bench.trained import TrainedLora
from pedyra.lora.files import read_rows

ROWS = 1024
"""To calibrate and to recover with, as `pedyra fit` takes by default."""
_SHAPE = {"method": str, "task": str, "seed": int, "budget": int, "learning_rate": float, "seconds": float}


def bench_sizes(comparison: Path, recoveries: Sequence[int] = (0, 160)) -> Iterator[Row]:
    """One row for each task, seed, smaller rank and number of steps of recovery.

    The largest rank of `lora` in the comparison is cut to the parameters of each smaller one, and recovers for so many
    steps. Both are judged by the mean loss on the same held-out batches, all of those of the comparison. `seconds` are
    of the cut and its recovery, calibration included; `training_seconds` of the run that is cut; `sweep_seconds` of the
    smaller LoRA from the start: its runs at every rate of the grid, and this one.

    Raises:
        ValueError: `comparison` is no folder of `pedyra compare` that has `lora` at two ranks or more, or a run of it
            is gone; told before anything is measured.
    """
    if not (comparison / "comparison.jsonl").is_file():
        raise ValueError(f"{comparison} has no comparison.jsonl; it takes a folder of `pedyra compare`")
    rows = [row for row in read_rows(comparison / "comparison.jsonl", _SHAPE | {"run": str}) if row["method"] == "lora"]
    ranks = sorted({row["budget"] for row in rows})
    if len(ranks) < 2:
        raise ValueError(
            f"{comparison} has LoRAs of {len(ranks)} ranks, and it takes two: run `pedyra compare` with method lora "
            f"and budgets: [1, 2, 4, 8]"
        )
    for row in rows:
        finished_run(Path(row["run"]))
    tuning = read_rows(comparison / "tuning.jsonl", _SHAPE)
    for large in rows:
        if large["budget"] == ranks[-1]:
            same = [row for row in rows if (row["task"], row["seed"]) == (large["task"], large["seed"])]
            yield from _against(large, [row for row in same if row is not large], tuning, recoveries)


def _against(large: Row, smaller: Sequence[Row], tuning: Sequence[Row], recoveries: Sequence[int]) -> Iterator[Row]:
    trained = TrainedLora(Path(large["run"]), ROWS)
    began = time.perf_counter()
    batches = list(trained.training)
    calibration = calibrate(trained.judge, batches)
    calibrating = time.perf_counter() - began
    ladder = Ladder(calibration, Shape())
    whole = trained.losses()
    for row in sorted(smaller, key=lambda each: -each["budget"]):
        other = TrainedLora(Path(row["run"]), ROWS)
        losses, size = other.losses(), ladder.point(ladder.within(other.parameters))
        tuned = [each for each in tuning if all(each[key] == row[key] for key in ("method", "task", "budget"))]
        for steps in recoveries:
            began = time.perf_counter()
            factors = cut_factors(trained.model, calibration, size.ranks)
            if steps:
                factors = distill(trained.judge, factors, batches, steps)
            seconds = calibrating + time.perf_counter() - began
            cut = trained.losses(partial(_with, trained, factors))
            less = paired(cut, losses, trained.weights)
            yield {
                **{key: large[key] for key in ("task", "seed")},
                "rank": large["budget"], "smaller_rank": row["budget"], "recover_steps": steps,
                "parameters": size.parameters, "lora_parameters": other.parameters,
                "loss": _mean(trained, cut), "lora_loss": _mean(trained, losses), "whole_loss": _mean(trained, whole),
                "lora_less_cut": less.mean, "standard_error": less.error,
                "seconds": seconds, "training_seconds": large["seconds"],
                "sweep_seconds": row["seconds"] + sum(each["seconds"] for each in tuned),
            }  # fmt: skip


@contextmanager
def _with(trained: TrainedLora, factors: Factors) -> Iterator[None]:
    """While it lasts, the model has these factors, and is in evaluation mode."""
    with evaluating(trained.model), replaced(trained.model, factors):
        yield


def _mean(trained: TrainedLora, losses: Sequence[float]) -> float:
    return paired([0.0] * len(losses), losses, trained.weights).mean

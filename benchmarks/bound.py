"""`python -m benchmarks.bound RUN`: fits whose promise is counted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean  # exact: the mean of ten equal shares is that share, to the last bit
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer

from benchmarks.command import JsonFile, Runs, Threads, command_line, print_done
from benchmarks.rows import RowFile
from benchmarks.trained import BATCH, TrainedLora, opened
from pedyra.fitting.calibration import disabled
from pedyra.fitting.fit import LEAST
from pedyra.fitting.search import Search
from pedyra.fitting.verdict import Increase, Tolerance, paired

BOUND_KEY = ("run", "fits", "asked")
"""`asked` is the tolerance that was given, of which a row has what came of it too."""


def bound(
    runs: Runs,
    fits: Annotated[int, typer.Option(min=1, help="Fits, each with held-out rows of its own.")] = 100,
    tolerance: Annotated[float, typer.Option(min=1e-6, max=0.999, help="Part of what was won.")] = 0.01,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Fit trained LoRAs again and again, and count the fits whose size costs no more than their tolerance."""
    file = RowFile(json_file, BOUND_KEY)
    columns = ["run", "fits", "within", "kept_whole", "share", "least_share", "most_share", "tolerance"]
    print_done(file.keep(bench_bound(runs, fits, tolerance)), columns)


def bench_bound(runs: Sequence[Path], fits: int = 100, tolerance: float = 0.01) -> Iterator[dict[str, Any]]:
    """Yield a row for each run: how many of so many fits, each with held-out rows of its own, kept their promise.

    The batches of all held-out rows are taken for the whole population. A fit draws its rows from them, with
    replacement: a third for the choice and two thirds for the proof. What a size truly costs is then its mean over the
    population, so that a fit that takes a size beyond its tolerance is known. Each size is measured once, on all rows.
    """
    for run in runs:  # what is wrong with one is told before anything is measured
        *_, task = opened(run)
        if (count := math.ceil(len(task.eval) / BATCH)) < LEAST + 1:
            raise ValueError(
                f"{run} has {count} batches of {BATCH} held-out rows, and a fit takes {LEAST} for the proof and one "
                f"for the choice at least; give it more (data.eval_rows, data.validation_fraction)"
            )
    for run in runs:
        population = Population(TrainedLora(run))
        found = [population.fit(seed, tolerance) for seed in range(fits)]
        shares = [share for share, _, _ in found]
        yield {
            "run": str(run),
            "fits": fits,
            "asked": tolerance,
            "within": sum(increase <= limit for _, increase, limit in found),
            "kept_whole": shares.count(1.0),
            "share": mean(shares),
            "least_share": min(shares),
            "most_share": max(shares),
            "tolerance": mean(limit for _, _, limit in found),
            "batches": len(population.base),
        }


class Population:
    """All held-out batches of a run, and what each size of its adapter costs on each of them."""

    def __init__(self, trained: TrainedLora) -> None:
        self.trained = trained
        self.base = trained.losses(partial(disabled, trained.model))
        self._cut: dict[int, list[float]] = {}

    def losses(self, place: int) -> list[float]:
        """Return the loss of each batch, with the size at this place of the ladder."""
        if place not in self._cut:
            self._cut[place] = self.trained.losses_at(self.trained.ladder.point(place).ranks)
        return self._cut[place]

    def increase(self, losses: Sequence[float], drawn: Sequence[int]) -> Increase:
        """Return the increase from the whole adapter's to these, over the batches that were drawn."""
        before, after, weights = (
            [each[i] for i in drawn] for each in (self.trained.whole, losses, self.trained.weights)
        )
        return paired(before, after, weights)

    def fit(self, seed: int, tolerance: float) -> tuple[float, float, float]:
        """The share that a fit with the rows of this seed keeps, by how much the loss truly rises, and by how much it
        may."""
        count = len(self.base)
        drawn = torch.randint(count, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
        choice, proof = drawn[: count // 3], drawn[count // 3 :]
        limit = Tolerance(self.increase(self.base, drawn), tolerance)
        samples = [sum(self.trained.weights[i] for i in part) for part in (choice, proof)]
        place_of = self.trained.ladder.parameters.index
        asked: Any = SimpleNamespace(
            recovers=False,
            ahead=((samples[0] / samples[1]) ** 0.5, len(proof)),
            on_choice=lambda size: self.increase(self.losses(place_of(size.parameters)), choice),
            on_proof=lambda size: (self.increase(self.losses(place_of(size.parameters)), proof), {}),
        )
        search = Search(self.trained.ladder, limit, asked)
        chosen = search.choose() if limit.learned else None
        allowed = tolerance * self.increase(self.base, range(count)).mean
        if chosen is None:
            return 1.0, 0.0, allowed
        place = next(place for place, point in search.points.items() if point is chosen)
        return chosen.share, self.increase(self.losses(place), range(count)).mean, allowed


if __name__ == "__main__":
    command_line(bound)

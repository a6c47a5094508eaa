"""`pedyra bench bound`: how often a fit takes a size that costs more than the tolerance it says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean  # exact: the mean of ten equal shares is that share, to the last bit
from typing import Any

import torch

from pedyra.app.runs.evaluate import finished_run
from pedyra.fitting.calibration import calibrate, disabled, truncated
from pedyra.fitting.curve import Ladder, Shape
from pedyra.fitting.search import Search
from pedyra.fitting.verdict import Increase, Tolerance, paired
from pedyra.lab.bench.trained import TrainedLora


def bench_bound(runs: Sequence[Path], fits: int = 100, tolerance: float = 0.01) -> Iterator[dict[str, Any]]:
    """One row for each run: of so many fits, each with held-out rows of its own, how many kept their promise.

    The batches of all held-out rows are taken for the whole population. A fit draws its rows from them, with
    replacement: a third for the choice and two thirds for the proof. What a size truly costs is then its mean over the
    population, so that a fit that takes a size beyond its tolerance is known. Each size is measured once, on all rows.

    Raises:
        ValueError: one of `runs` is no finished run; told before anything is measured.
    """
    for run in runs:
        finished_run(run)
    for run in runs:
        population = Population(run)
        found = [population.fit(seed, tolerance) for seed in range(fits)]
        shares = [share for share, _, _ in found]
        yield {
            "run": str(run),
            "fits": fits,
            "within": sum(increase <= limit for _, increase, limit in found),
            "kept_whole": shares.count(1.0),
            "share": mean(shares),
            "least_share": min(shares),
            "most_share": max(shares),
            "tolerance": mean(limit for _, _, limit in found),
            "batches": len(population.whole),
        }


class Population:
    """All held-out rows of a run, and what each size of its adapter costs on each batch of them."""

    def __init__(self, run: Path) -> None:
        self.trained = TrainedLora(run, rows=1024)
        self.calibration = calibrate(self.trained.judge, self.trained.training)
        self.ladder = Ladder(self.calibration, Shape())
        self.weights = self.trained.weights
        self.whole = self.trained.losses()
        self.base = self.trained.losses(partial(disabled, self.trained.model))
        self._cut: dict[int, list[float]] = {}

    def losses(self, place: int) -> list[float]:
        """Of each batch, with the size at this place of the ladder."""
        if place not in self._cut:
            ranks = self.ladder.point(place).ranks
            self._cut[place] = self.trained.losses(partial(truncated, self.trained.model, self.calibration, ranks))
        return self._cut[place]

    def increase(self, before: list[float], after: list[float], drawn: Sequence[int]) -> Increase:
        return paired([before[i] for i in drawn], [after[i] for i in drawn], [self.weights[i] for i in drawn])

    def fit(self, seed: int, tolerance: float) -> tuple[float, float, float]:
        """The share that a fit with the rows of this seed keeps, by how much the loss truly rises, and its limit."""
        count = len(self.whole)
        drawn = torch.randint(count, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
        choice, proof = drawn[: count // 3], drawn[count // 3 :]
        limit = Tolerance(self.increase(self.whole, self.base, drawn), tolerance)
        samples = [sum(self.weights[i] for i in part) for part in (choice, proof)]
        search = Search(
            self.ladder,
            limit.loss,
            measure=lambda place: self.increase(self.whole, self.losses(place), choice),
            recover=None,
            prove=lambda place, _: self.increase(self.whole, self.losses(place), proof),
            ahead=((samples[0] / samples[1]) ** 0.5, len(proof)),
        )
        chosen = search.choose() if limit.learned else None
        if chosen is None:
            return 1.0, 0.0, limit.loss
        place = next(place for place, point in search.points.items() if point is chosen)
        return chosen.share, self.increase(self.whole, self.losses(place), range(count)).mean, limit.loss

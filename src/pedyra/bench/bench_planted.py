"""`pedyra bench planted`: every allocation against the known answer, on the problems of planted.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from pedyra.bench.contenders import CONTENDERS, Contender, check_length, contender
from pedyra.bench.loop import Loss
from pedyra.bench.patterns import parse_settings
from pedyra.bench.trial import run_trial
from pedyra.compare.row_file import Row, RowFile
from pedyra.tasks.planted_problem import Problem, batches, make_problem, relative_error

METHODS = (*CONTENDERS, "oracle")
KEY = ("method", "set", "config", "architecture", "width", "depth", "rank", "profile", "noise", "seed", "steps", "lr")
"""What makes two rows the same run."""
BATCH = 128


@dataclass(frozen=True)
class Size:
    """How large the benchmark is."""

    architecture: str = "mlp"
    width: int = 64
    depth: int = 12
    """Linear layers."""
    rank: int = 4
    """The student's uniform rank; times `depth` it is the budget."""
    steps: int = 1500


class Lesson:
    """A problem and its batches, drawn once for all methods."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem = problem
        self._draw = batches(problem, seed + 1000, BATCH)
        self._drawn: list[tuple[Tensor, Tensor]] = []

    def replay(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from the first on, without end."""
        index = 0
        while True:
            if index == len(self._drawn):
                self._drawn.append(self._draw())
            yield self._drawn[index]
            index += 1


def bench_planted(
    methods: Sequence[str],
    profiles: Sequence[str],
    *,
    seeds: Sequence[int],
    noises: Sequence[float] = (0.0,),
    lrs: Sequence[float] = (5e-3,),
    settings: Sequence[str] = (),
    sizes: Sequence[Size] = (Size(),),
    file: RowFile | None = None,
) -> Iterator[Row]:
    """A row per size, profile, noise, seed, learning rate and method, in this order; known ones are not made again.

    `relative_error` is 1 for the untouched base; None where the run diverged. `rank_distance` is the number of ranks
    that stand in a wrong layer: half the sum of |rank - true rank|. `settings` are name=value of RankConfig for
    `pedyra`.

    Raises:
        ValueError: an unknown method, setting, profile or architecture, before anything is trained.
    """
    file = file or RowFile(None, KEY)
    changes = parse_settings(settings)
    # The oracle's ranks are another problem's in every run.
    contenders = {name: Contender() if name == "oracle" else contender(name, changes) for name in methods}
    for name, chosen in contenders.items():
        check_length(chosen, min(size.steps for size in sizes), name)

    @lru_cache(maxsize=1)
    def lesson(size: Size, profile: str, noise: float, seed: int) -> Lesson:
        return Lesson(
            make_problem(
                profile, seed, architecture=size.architecture, width=size.width, depth=size.depth, rank=size.rank,
                noise=noise,
            ),
            seed,
        )  # fmt: skip

    jobs = []
    for size in sizes:
        for profile in profiles:
            for noise in noises:
                lesson(size, profile, noise, seeds[0])  # raises for what cannot be
            for noise in noises:
                for seed in seeds:
                    for lr in lrs:
                        for name in methods:
                            changed = ",".join(settings) if name.partition(":")[0] == "pedyra" else ""
                            job = {"method": name, "set": changed, "profile": profile, "noise": noise, "seed": seed}
                            job["config"] = contenders[name].config_digest
                            jobs.append({**job, "lr": lr, **vars(size)})

    def run(job: Row) -> Row:
        size = Size(**{name: job[name] for name in vars(Size())})
        taught = lesson(size, job["profile"], job["noise"], job["seed"])
        oracle = job["method"] == "oracle"
        return _run(taught, _oracle(taught.problem) if oracle else contenders[job["method"]], job)

    yield from file.complete(jobs, run)


def _oracle(problem: Problem) -> Contender:
    """LoRA with the true ranks from the start."""
    true = dict(zip(problem.layer_names, problem.true_ranks, strict=True))
    return Contender(pattern=lambda costs, rank, gains: true)


def _run(taught: Lesson, contender: Contender, job: Mapping[str, Any]) -> Row:
    problem, replay = taught.problem, taught.replay()

    def draw() -> Loss:
        x, target = next(replay)
        return lambda model: (model(x) - target).square().mean()

    trial = run_trial(
        problem.base,
        problem.layer_names,
        contender,
        draw,
        rank=job["rank"],
        lr=job["lr"],
        steps=job["steps"],
        seed=job["seed"],
    )
    ranks = [trial.ranks[name] for name in problem.layer_names]
    wrong = sum(abs(rank - true) for rank, true in zip(ranks, problem.true_ranks, strict=True))
    return {
        "relative_error": float("nan") if trial.diverged else relative_error(problem, trial.model),
        "rank_distance": wrong / 2,
        "ranks": ranks,
        "true_ranks": list(problem.true_ranks),
        "adjustments": trial.adjustments,
        "seconds": round(trial.seconds, 2),
    }

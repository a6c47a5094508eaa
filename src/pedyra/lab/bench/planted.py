"""`pedyra bench planted`: every method against the known answer, on the problems of pedyra.app.tasks.planted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from pedyra.app.tasks.planted import Problem, batches, make_problem, relative_error
from pedyra.lab.bench.row_file import Row, RowFile
from pedyra.lab.bench.run import Setting, run_method
from pedyra.lab.bench.spec import MethodSpec, parse_method
from pedyra.methods.registry import METHODS

KEY = ("method", "config", "architecture", "width", "depth", "rank", "profile", "noise", "seed", "steps", "lr")
"""What makes two rows the same run."""
BATCH = 128


def every_method() -> list[str]:
    """The methods that run here, and the oracle: LoRA with the true ranks from the start."""
    return [*(name for name in METHODS if name != "qlora" or find_spec("bitsandbytes")), "oracle"]


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


def bench_planted(
    methods: Sequence[str],
    profiles: Sequence[str],
    *,
    seeds: Sequence[int],
    noises: Sequence[float] = (0.0,),
    lrs: Sequence[float] = (5e-3,),
    sizes: Sequence[Size] = (Size(),),
    file: RowFile | None = None,
) -> Iterator[Row]:
    """A row per size, profile, noise, seed, learning rate and method, in this order; known ones are not made again.

    `relative_error` is 1 for the untouched base; None where the run diverged. `rank_distance` is the number of ranks
    that stand in a wrong layer: half the sum of |rank - true rank|; None, as `ranks`, for an adapter without ranks.

    Raises:
        ValueError: an unknown method, setting, profile or architecture, before anything is trained.
    """
    file = file or RowFile(None, KEY)
    specs = {text: parse_method("lora" if text == "oracle" else text) for text in methods}

    @lru_cache(maxsize=1)
    def problem_of(size: Size, profile: str, noise: float, seed: int) -> Problem:
        shape = dict(architecture=size.architecture, width=size.width, depth=size.depth, rank=size.rank)
        return make_problem(profile, seed, noise=noise, **shape)  # type: ignore[arg-type]

    jobs = []
    for size in sizes:
        for profile in profiles:
            for noise in noises:
                problem_of(size, profile, noise, seeds[0])  # raises for what cannot be
            jobs += [
                {"method": text, "profile": profile, "noise": noise, "seed": seed, "config": specs[text].digest}
                | {"lr": lr, **vars(size)}
                for noise in noises
                for seed in seeds
                for lr in lrs
                for text in methods
            ]

    def run(job: Row) -> Row:
        problem = problem_of(Size(**{key: job[key] for key in vars(Size())}), job["profile"], job["noise"], job["seed"])
        spec = specs[job["method"]]
        if job["method"] == "oracle":
            true = dict(zip(problem.layer_names, problem.true_ranks, strict=True))
            spec = MethodSpec(text="oracle", name="lora", lora={"ranks": true})
        return _run(problem, spec, job)

    yield from file.complete(jobs, run)


def _run(problem: Problem, spec: MethodSpec, job: Row) -> Row:
    def drawn() -> Iterator[tuple[Tensor, Tensor]]:
        draw = batches(problem, job["seed"] + 1000, BATCH)
        while True:
            yield draw()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, target = batch
        return (model(x) - target).square().mean()

    setting = Setting(
        base=problem.base,
        layers=problem.layer_names,
        loss=loss,
        batches=drawn,
        rank=job["rank"],
        lr=job["lr"],
        steps=job["steps"],
        seed=job["seed"],
    )
    outcome = run_method(spec, setting)
    ranks = None if outcome.ranks is None else [outcome.ranks[name] for name in problem.layer_names]
    wrong = None
    if ranks is not None:
        wrong = sum(abs(rank - true) for rank, true in zip(ranks, problem.true_ranks, strict=True)) / 2
    return {
        "relative_error": float("nan") if outcome.diverged else relative_error(problem, outcome.model),
        "rank_distance": wrong,
        "ranks": ranks,
        "true_ranks": list(problem.true_ranks),
        "parameters": outcome.parameters,
        "adjustments": outcome.adjustments,
        "seconds": round(outcome.seconds, 2),
    }

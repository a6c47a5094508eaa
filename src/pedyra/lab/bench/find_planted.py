"""`pedyra bench planted`: every method against the known answer, on the problems of `planted_problem`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from pedyra.lab.bench.method_run import BenchTraining, run_method
from pedyra.lab.bench.planted_problem import DEPTH, RANK, WIDTH, Problem, batches, make_problem, relative_error
from pedyra.lab.bench.rows import PLANTED_KEY, Row, RowFile, rates_by_method, summary
from pedyra.lab.bench.spec import MethodSpec, parse_method
from pedyra.methods.registry import METHODS

BATCH = 128
SMOKE_STEPS = 24
"""The fewest in which every method does what it does."""
ORACLE = "oracle"
"""LoRA with the true ranks from the start."""


def every_method() -> list[str]:
    """The methods but those that need quantised weights, and the oracle."""
    return [*(name for name, method in METHODS.items() if method.quantization is None), ORACLE]


@dataclass(frozen=True, kw_only=True)
class Problems:
    """What every method is tried on: each of these with each other."""

    profiles: Sequence[str] = ("design",)
    seeds: Sequence[int] = (0,)
    noises: Sequence[float] = (0.0,)
    """Of the targets, by the size of the true change."""
    lrs: Sequence[float] = (5e-3,)
    architectures: Sequence[str] = ("mlp",)
    steps: int = 1500


def bench_planted(methods: Sequence[str], problems: Problems, file: RowFile | None = None) -> Iterator[Row]:
    """A row per architecture, profile, noise, seed, rate and method, in this order; known ones are not made again.

    `relative_error` is 1 for the untouched base; None where the run diverged. `rank_distance` is the number of ranks
    that stand in a wrong layer: half the sum of |rank - true rank|; None, as `ranks`, for an adapter without ranks.

    Raises:
        ValueError: an unknown method, setting, profile or architecture, before anything is trained.
    """
    file = file or RowFile(None, PLANTED_KEY)
    specs = {text: parse_method("lora" if text == ORACLE else text) for text in methods}

    @lru_cache(maxsize=1)
    def problem_of(architecture: str, profile: str, noise: float, seed: int) -> Problem:
        return make_problem(profile, seed, architecture=architecture, noise=noise)

    cases = list(product(problems.architectures, problems.profiles, problems.noises))
    for case in cases:
        problem_of(*case, problems.seeds[0])  # raises for what cannot be
    shape = {"width": WIDTH, "depth": DEPTH, "rank": RANK, "steps": problems.steps}
    jobs = [
        {"method": text, "profile": profile, "noise": noise, "seed": seed, "config": specs[text].digest}
        | {"lr": lr, "architecture": architecture, **shape}
        for architecture, profile, noise in cases
        for seed, lr, text in product(problems.seeds, problems.lrs, methods)
    ]

    def run(job: Row) -> Row:
        problem = problem_of(job["architecture"], job["profile"], job["noise"], job["seed"])
        spec = specs[job["method"]]
        if job["method"] == ORACLE:
            true = dict(zip(problem.layer_names, problem.true_ranks, strict=True))
            spec = MethodSpec(text=ORACLE, name="lora", lora={"ranks": true})
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

    training = BenchTraining(
        base=problem.base,
        layers=problem.layer_names,
        loss=loss,
        batches=drawn,
        rank=RANK,
        lr=job["lr"],
        steps=job["steps"],
        seed=job["seed"],
    )
    done = run_method(spec, training)
    ranks, wrong = None, None
    if done.ranks is not None:
        ranks = [done.ranks[name] for name in problem.layer_names]
        wrong = sum(abs(rank - true) for rank, true in zip(ranks, problem.true_ranks, strict=True)) / 2
    return {
        "relative_error": float("nan") if done.diverged else relative_error(problem, done.model),
        "rank_distance": wrong,
        "ranks": ranks,
        "true_ranks": list(problem.true_ranks),
        "parameters": done.parameters,
        "adjustments": done.adjustments,
        "seconds": round(done.seconds, 2),
    }


def summarise_planted(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """What is the same for a table -> its lines, one a method at the learning rate with its lowest mean error."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        shape = f"{row['architecture']}, {row['depth']} layers of width {row['width']}"
        groups.setdefault(f"{row['profile']}, noise {row['noise']:g} ({shape})", []).append(row)
    return {title: _lines(own) for title, own in groups.items()}


def _lines(rows: Sequence[Row]) -> list[Row]:
    lines = summary(rows, "relative_error")
    errors = {line["method"]: line["relative_error"] for line in lines}
    methods = rates_by_method(rows)
    found = []
    for line in lines:
        own = methods[line["method"]][line["lr"]].values()
        wrong = [row["rank_distance"] for row in own if row["rank_distance"] is not None]
        times = {f"x {other}": line["relative_error"] / errors[other] for other in (ORACLE, "lora") if other in errors}
        kept = {key: line[key] for key in ("method", "relative_error", "s.e.", "lr", "seeds")}
        ranks = {"ranks wrong": fmean(wrong) if wrong else None}
        found.append({**kept, **times, **ranks, "seconds": fmean(row["seconds"] for row in own)})
    return found

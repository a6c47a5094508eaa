"""`pedyra bench planted`: every method against the known answer, on the problems of `planted_problem`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from pedyra.lab.bench.planted_problem import DEPTH, RANK, WIDTH, Problem, batches, make_problem, relative_error
from pedyra.lab.bench.rates import best_rate, rates_by_method
from pedyra.lab.bench.rows import PLANTED_KEY, Row, RowFile
from pedyra.lab.bench.run import Setting, run_method
from pedyra.lab.bench.spec import MethodSpec, parse_method
from pedyra.lab.compare.statistics import standard_error
from pedyra.methods.names import NAMES

BATCH = 128
ORACLE = "oracle"
"""LoRA with the true ranks from the start."""


def every_method() -> list[str]:
    """The methods that run here, and the oracle."""
    return [*(name for name in NAMES if name != "qlora" or find_spec("bitsandbytes")), ORACLE]


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

    shape = {"width": WIDTH, "depth": DEPTH, "rank": RANK, "steps": problems.steps}
    jobs = []
    for architecture in problems.architectures:
        for profile in problems.profiles:
            for noise in problems.noises:
                problem_of(architecture, profile, noise, problems.seeds[0])  # raises for what cannot be
            jobs += [
                {"method": text, "profile": profile, "noise": noise, "seed": seed, "config": specs[text].digest}
                | {"lr": lr, "architecture": architecture, **shape}
                for noise in problems.noises
                for seed in problems.seeds
                for lr in problems.lrs
                for text in methods
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

    setting = Setting(
        base=problem.base,
        layers=problem.layer_names,
        loss=loss,
        batches=drawn,
        rank=RANK,
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


def summarise_planted(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """What is the same for a table -> its lines, one a method at the learning rate with its lowest mean error."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        shape = f"{row['architecture']}, {row['depth']} layers of width {row['width']}"
        title = f"{row['profile']}, noise {row['noise']:g} ({shape})"
        groups.setdefault(title, []).append({**row, "loss": row["relative_error"]})
    return {title: _lines(own) for title, own in groups.items()}


def _lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    found = rates_by_method(rows)
    best = {method: best_rate(errors) for method, errors in found.items()}
    errors = {method: list(found[method][rate].values()) for method, rate in best.items()}
    means = {method: fmean(each) for method, each in errors.items()}
    lines = []
    for method, rate in best.items():
        own = [row for row in rows if (row["method"], row["lr"]) == (method, rate)]
        wrong = [row["rank_distance"] for row in own if row["rank_distance"] is not None]
        line = {"method": method, "error": means[method], "s.e.": standard_error(errors[method])}
        line |= {f"x {other}": means[method] / means[other] if other in means else None for other in (ORACLE, "lora")}
        line |= {"ranks wrong": fmean(wrong) if wrong else None, "lr": rate, "seeds": len(own)}
        lines.append({**line, "seconds": fmean([row["seconds"] for row in own])})
    return lines

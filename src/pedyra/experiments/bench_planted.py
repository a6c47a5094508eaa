"""`pedyra bench planted`: every allocation against the known answer, on the problem of planted.py."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from pedyra.config import RankConfig
from pedyra.experiments.planted import Problem, batches, make_problem
from pedyra.methods.adalora_svd import CubicPruning
from pedyra.methods.random_moves import RandomMoves
from pedyra.training.rank_allocator import RankAllocator
from pedyra.training.rule import Policy, bidirectional

RANK = 4
"""The student's uniform rank; times 12 layers it is the budget of every profile."""

_WINDOW: dict[str, Any] = dict(interval=1 / 30, initial_warmup=1 / 15, final_warmup=4 / 15)
_ADALORA: dict[str, Any] = dict(alpha=1.0, omega="uniform", score_norm="none", start="svd", budget="ranks", min_rank=0)
_GRADIENT: dict[str, Any] = dict(init="gradient", expand="gradient", min_rank=0)


@dataclass(frozen=True)
class Contender:
    """One allocation: None for `config` keeps every rank; `oracle` starts from the true ones."""

    config: RankConfig | None = None
    policy: Policy = bidirectional
    rank: int = RANK
    oracle: bool = False


# k is 8 of the 48 triples at first: with the 2 % of RankConfig() one triple would move at a time.
CONTENDERS: dict[str, Contender] = {
    "lora": Contender(),
    "random": Contender(RankConfig(**_WINDOW, moves=8), RandomMoves(0)),
    "adalora": Contender(
        RankConfig(**_WINDOW, **_ADALORA, orth_weight=0.1), CubicPruning(3 * RANK // 2, RANK), 3 * RANK // 2
    ),
    "pedyra-paper": Contender(RankConfig.paper(**_WINDOW, moves=4)),
    "pedyra": Contender(RankConfig(**_WINDOW, moves=8)),
    "pedyra-min0": Contender(RankConfig(**_WINDOW, moves=8, min_rank=0)),
    "pedyra-gradient": Contender(RankConfig(**_WINDOW, **_GRADIENT, moves=8)),
    "pedyra-gradient-seeded": Contender(RankConfig(**_WINDOW, **_GRADIENT, moves=8, new_moments="seed")),
    "oracle": Contender(oracle=True),
}

COLUMNS = ("method", "profile", "noise", "seed", "relative_error", "rank_distance", "ranks", "seconds")


def bench_planted(
    methods: Sequence[str],
    profiles: Sequence[str],
    *,
    seeds: Sequence[int],
    noises: Sequence[float] = (0.0,),
    steps: int = 1500,
    lr: float = 5e-3,
) -> Iterator[dict[str, Any]]:
    """A row per method, profile, noise and seed; `relative_error` is that of the untouched base times less.

    `rank_distance` is the number of ranks that stand in a wrong layer: half the sum of |rank - true rank|.

    Raises:
        ValueError: an unknown method or profile.
    """
    for method in methods:
        if method not in CONTENDERS:
            raise ValueError(f"method {method!r} is not in bench planted; choose from {', '.join(CONTENDERS)}")
    for profile in profiles:
        for noise in noises:
            for seed in seeds:
                problem = make_problem(profile, seed, noise=noise)
                for method in methods:
                    yield {"method": method, "profile": profile, "noise": noise, "seed": seed} | _row(
                        problem, CONTENDERS[method], seed, steps, lr
                    )


def _row(problem: Problem, contender: Contender, seed: int, steps: int, lr: float) -> dict[str, Any]:
    began = time.perf_counter()
    model, allocator = _train(problem, contender, seed, steps, lr)
    names = [f"layers.{index}" for index in range(len(problem.true_ranks))]
    if allocator is not None:
        ranks = [allocator.ranks[name] for name in names]
    else:
        ranks = list(problem.true_ranks) if contender.oracle else [contender.rank] * len(names)
    distance = sum(abs(rank - true) for rank, true in zip(ranks, problem.true_ranks, strict=True)) / 2
    return {
        "relative_error": relative_error(problem, model),
        "rank_distance": distance,
        "ranks": ranks,
        "true_ranks": list(problem.true_ranks),
        "seconds": time.perf_counter() - began,
    }


def _train(
    problem: Problem, contender: Contender, seed: int, steps: int, lr: float
) -> tuple[PeftModel, RankAllocator | None]:
    """Adam with a linear decay to zero on fresh batches of 128, the same ones for every contender."""
    torch.manual_seed(seed)
    model = _student(problem, contender)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    allocator = None
    if contender.config is not None:
        allocator = RankAllocator(model, optimizer, contender.config, steps, policy=contender.policy)
    draw = batches(problem, seed + 1000, 128)
    for _ in range(steps):
        x, target = draw()
        (model(x) - target).square().mean().backward()
        if allocator is not None:
            allocator.before_step()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if allocator is not None:
            allocator.after_step()
    return model, allocator


def _student(problem: Problem, contender: Contender) -> PeftModel:
    """The base with a LoRA of scaling 1: uniform ranks, or the true ones for the oracle."""
    ranks = {f"layers.{i}": contender.rank for i in range(len(problem.true_ranks))}
    if contender.oracle:
        ranks = {f"layers.{i}": rank for i, rank in enumerate(problem.true_ranks) if rank}
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks)
    model = get_peft_model(copy.deepcopy(problem.base), config)  # type: ignore[arg-type]
    assert isinstance(model, PeftModel)
    return model


@torch.no_grad()
def relative_error(problem: Problem, model: torch.nn.Module) -> float:
    """Mean squared distance to the teacher over that of the base, on 2048 held-out inputs without noise."""
    x = torch.randn(2048, problem.width, generator=torch.Generator().manual_seed(999))
    target = problem.teacher(x)
    return float((model(x) - target).square().mean() / (problem.base(x) - target).square().mean())

"""One run of one contender: a base module, its LoRA student, Adam with a linear decay, and the ranks at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from peft import PeftModel
from torch import nn

from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.bench.contenders import Contender, check_length
from pedyra.bench.looks import Setup
from pedyra.bench.loop import Draw, make_plain, make_student, train
from pedyra.config import RankConfig
from pedyra.lora.attach import attach
from pedyra.lora.factors import AFactor
from pedyra.lora.layer import rank_parameters


@dataclass(frozen=True)
class Trial:
    """How a run ended."""

    model: PeftModel
    ranks: dict[str, int]
    """Of every layer that could be adapted, in the order given."""
    parameters: int
    """Of the ranks at the end, as they are on disk (A and B)."""
    diverged: bool
    """The loss was not finite at some step, and the run stopped there."""
    adjustments: int
    """Adjustments that moved a triple."""
    seconds: float


def run_trial(
    base: nn.Module,
    layers: Sequence[str],
    contender: Contender,
    draw: Draw,
    *,
    rank: int,
    lr: float,
    steps: int,
    seed: int,
    scaling: float = 1.0,
    warmup: int = 0,
    clip: float | None = None,
    fused: bool = False,
) -> Trial:
    """Adapt `layers` of `base` (nn.Linear, by name) for `steps` steps, at the budget of a uniform `rank`.

    Args:
        lr: the peak; it rises linearly for `warmup` steps and falls linearly to zero at the last.
        scaling: alpha / r, the same for every rank.
        clip: largest norm of the gradient; None: any.
        fused: `RankConfig.fused`, also for fixed ranks; worth it from about a thousand tokens a step.

    Raises:
        ValueError: a budget, schedule or number of steps that the contender cannot meet, a layer name it does not find.
    """
    check_length(contender, steps)
    began = time.perf_counter()
    costs = layer_costs(base, layers)
    factors = [min(1.0, (step + 1) / (warmup + 1)) * (1 - step / steps) for step in range(steps)]
    look = None
    if contender.look is not None:
        setup = Setup(
            base=base, layers=layers, draw=draw, rank=rank, lr=lr, scaling=scaling, factors=factors, clip=clip,
            seed=seed, fused=fused,
        )  # fmt: skip
        look = contender.look(setup)
        factors = factors[look.steps :]
    if contender.pattern is not None:
        start_ranks = contender.pattern(costs, rank, look.gains if look else {})
    else:
        start_ranks = dict.fromkeys(layers, contender.first_rank(rank))
    config = _config(contender, rank * len(layers), seed)
    model = make_student(base, start_ranks, scaling * contender.scale(rank), seed)
    adapted = attach(model, start=config.start if config else "lora", seed=seed)
    if look is not None:
        look.start(adapted)
    if contender.start is not None:
        contender.start(model, adapted, seed)
    fused = fused and all(type(layer.a) is AFactor for layer in adapted)
    if config is None:
        make_plain(adapted, fused)
    optimizer = contender.optimizer(adapted, lr)
    allocator = None
    if config is not None:
        rule = contender.rule(config, rank)
        allocator = RankAllocator(model, optimizer, replace(config, fused=fused), len(factors), policy=rule)
        if contender.ready is not None:
            contender.ready(allocator)
    diverged = train(
        model, optimizer, draw, factors, clip=clip, allocator=allocator,
        after_step=contender.after_step,
    )  # fmt: skip
    ranks = dict.fromkeys(layers, 0) | (allocator.ranks if allocator else start_ranks)
    if contender.finish is not None:
        ranks |= contender.finish(model, adapted, rank)
    history = allocator.history if allocator else []
    return Trial(
        model=model,
        ranks=ranks,
        parameters=sum(costs[name] * r for name, r in ranks.items()),
        diverged=diverged,
        adjustments=sum(bool(record["pruned"] or record["added"]) for record in history),
        seconds=time.perf_counter() - began,
    )


def layer_costs(base: nn.Module, layers: Sequence[str]) -> dict[str, int]:
    """Layer name -> in + out, the parameters of one rank on disk."""
    return {name: rank_parameters(*base.get_submodule(name).weight.shape) for name in layers}  # type: ignore[misc, union-attr]


def _config(contender: Contender, total_rank: int, seed: int) -> RankConfig | None:
    if contender.config is None:
        return None
    config = replace(contender.config, seed=seed)
    if config.moves is None and contender.moves is not None:
        config = replace(config, moves=max(1, round(contender.moves * total_rank)))
    return config

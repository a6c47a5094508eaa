"""One run of one method has a base module, its adapter, Adam with a linear decay, and the ranks at the end."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from benchmarks.loop import Loop, make_optimizer
from benchmarks.spec import MethodSpec
from pedyra.errors import UserError
from pedyra.lora.attach import attach, drop_empty
from pedyra.lora.layer import rank_parameters
from pedyra.methods.data import Data
from pedyra.methods.method import Adaptation, Request, changed, with_ranks
from pedyra.methods.registry import get_method

WINDOW: dict[str, Any] = dict(interval=1 / 30, initial_warmup=1 / 15, final_warmup=4 / 15)
"""Every rank-adaptive method has this schedule."""
MOVES = {"pedyra": 1 / 12, "random": 1 / 6, "mask": 1 / 12}
"""Its k is this part of the total rank."""
IN_RANKS = ("increlora", "triadaptlora")
"""These methods are defined by a budget of ranks; all others spend parameters where they can choose."""


@dataclass(frozen=True, kw_only=True)
class BenchTraining:
    """Every method of a benchmark gets this training.

    Args:
        layers: the nn.Linear to adapt, by name.
        rank: the uniform rank whose parameters are the budget.
        lr: that of the first step; it falls linearly to zero at the last.
        ranks: layer -> rank of a LoRA that has them from the start; layers of rank 0 are left out. None: `rank`.
    """

    base: nn.Module
    layers: Sequence[str]
    loss: Callable[[nn.Module, Any], Tensor]
    batches: Callable[[], Iterator[Any]]
    rank: int
    lr: float
    steps: int
    seed: int
    ranks: Mapping[str, int] | None = None


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """It tells how a run ended."""

    model: PeftModel
    ranks: dict[str, int] | None
    """Every layer that could be adapted has one, in the order given; None for an adapter without ranks (RandLoRA)."""
    parameters: int
    """They are the adapter's at the end."""
    diverged: bool
    """The loss was not finite at some step, and the run stopped there."""
    adjustments: int
    """So many of them moved a triple."""
    seconds: float
    """They are of the whole run, with what the method did before the first step."""


def run_method(spec: MethodSpec, training: BenchTraining) -> FinishedRun:
    """Adapt a copy of the base by the method, at the budget of the uniform rank.

    What a method looks at before the first step comes from the run's own batches, and is not taken off its steps.

    Raises:
        ValueError: a budget, schedule or number of steps that the method cannot meet, a setting without effect.
    """
    began = time.perf_counter()
    adaptation = get_method(spec.name).prepare(request(spec, training))
    _check_effect(spec, adaptation)
    model = adaptation.model
    optimizer = make_optimizer(adaptation, torch.optim.Adam, lr=training.lr, fused=True)
    loop = Loop(adaptation, optimizer, training.steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / training.steps)
    diverged = False
    for batch in islice(training.batches(), training.steps):
        loop.begin_step()
        value = training.loss(model, batch)
        if not value.isfinite():
            diverged = True
            break
        value.backward()
        loop.step()
        scheduler.step()
    history = [] if loop.allocator is None else loop.allocator.history
    loop.finish()
    ranks, parameters = _final_size(model, training.layers)
    return FinishedRun(
        model=model.eval(),  # to be judged
        ranks=ranks,
        parameters=parameters,
        diverged=diverged,
        adjustments=sum(bool(record["pruned"] or record["added"]) for record in history),
        seconds=time.perf_counter() - began,
    )


def request(spec: MethodSpec, training: BenchTraining) -> Request:
    """Return what the benchmark asks of the method; the base is copied."""
    lora = LoraConfig(r=training.rank, lora_alpha=training.rank, target_modules=list(training.layers))
    if training.ranks is not None:
        ranks = {name: rank for name, rank in training.ranks.items() if rank}
        lora = changed(with_ranks(lora, ranks, ranks), target_modules=set(ranks))  # each with the scaling of the others
    return Request(
        method=spec.name,
        model=copy.deepcopy(training.base),
        lora=lora,
        rank={**_rank_settings(spec.name, training), **spec.rank},
        settings=spec.settings,
        seed=training.seed,
        steps=training.steps,
        data=Data(batches=training.batches, loss=training.loss),
    )


def _rank_settings(name: str, training: BenchTraining) -> dict[str, Any]:
    """Return equal parameters, and a schedule that is the same for all."""
    settings: dict[str, Any] = {"seed": training.seed, **WINDOW}
    if name not in IN_RANKS:
        settings["budget"] = "parameters"
    if name in MOVES:
        settings["moves"] = max(1, round(MOVES[name] * training.rank * len(training.layers)))
    return settings


def _check_effect(spec: MethodSpec, adaptation: Adaptation) -> None:
    """Raise ValueError for a rank setting that the method has no use for, or is defined by another value of."""
    if adaptation.ranks is None:
        return
    made = adaptation.ranks.to_dict()
    for key, value in spec.rank.items():
        if key in made and made[key] != value:
            raise UserError(
                f"method {spec.text!r}: {spec.name} has no use for {key}, or is defined by {made[key]!r}; drop it"
            )


def _final_size(model: PeftModel, layers: Sequence[str]) -> tuple[dict[str, int] | None, int]:
    """Return the ranks at the end, and the parameters of the adapter as it is saved, where E is folded into A."""
    base: Any = model.get_base_model()
    others = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(f".lora_{factor}." in name for factor in "AEB")
    )
    if model.peft_config["default"].peft_type == "RANDLORA":
        return None, others
    ranks = dict.fromkeys(layers, 0)
    if model.peft_config["default"].peft_type == "ADALORA":
        found = {name: base.get_submodule(name).lora_E["default"] for name in layers}
        ranks |= {name: int(E.count_nonzero()) for name, E in found.items()}
    else:
        attached = attach(model)
        drop_empty(attached)
        ranks |= {layer.name: layer.rank for layer in attached}
    of = {name: base.get_submodule(name) for name in layers}
    spent = sum(rank * rank_parameters(of[name].in_features, of[name].out_features) for name, rank in ranks.items())
    return ranks, others + spent

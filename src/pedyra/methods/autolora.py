"""AutoLoRA (Zhang R. et al. 2024): a bilevel search weighs each layer's ranks; LoRA is trained at those that count."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from pedyra.methods.adapter import with_adapter, with_lora, with_ranks
from pedyra.methods.data import Data
from pedyra.methods.hypergradient import gradients_of, hypergradient
from pedyra.methods.method import Adaptation, Method, Request
from pedyra.methods.own_factors import fill, linear_slots
from pedyra.methods.settings import refuse_lora, require

logger = logging.getLogger(__name__)

BatchLoss = Callable[[nn.Module], Tensor]
"""A model's loss on one batch."""
PASSES_PER_STEP = 5
"""Forward and backward passes of a search step: two lower steps, validation, and both ends of the difference."""


@dataclass(frozen=True, kw_only=True)
class AutoLoraSettings:
    """Settings of AutoLoRA's search; the defaults are the authors'."""

    search_rank: int | None = None
    """k, the ranks a layer chooses from. None: lora.r. The ranks found are about half of it and never above."""
    search_steps: int | None = None
    """Each costs five training steps. None: as many as the run has, which is about how long the authors search."""
    validation_fraction: float = 0.3
    """Part of the training rows that weighs the ranks; the run's own held-out rows are never looked at."""
    lower_learning_rate: float = 3e-4
    """Of A and B, while searching."""
    upper_learning_rate: float = 3e-4
    """Of the weights of the ranks."""

    def __post_init__(self) -> None:
        for name in ("lower_learning_rate", "upper_learning_rate"):
            value = getattr(self, name)
            require(value > 0, f"method_settings.{name} is {value}; it must be positive")
        rank, steps, fraction = self.search_rank, self.search_steps, self.validation_fraction
        require(rank is None or rank >= 2, f"method_settings.search_rank is {rank}; a choice needs 2 ranks or more")
        require(steps is None or steps >= 1, f"method_settings.search_steps is {steps}; at least 1")
        require(0 < fraction < 1, f"method_settings.validation_fraction is {fraction}; it must lie in (0, 1)")


@dataclass(frozen=True)
class Found:
    """What a search came to, and what it cost."""

    ranks: dict[str, int]
    """Layer name -> rank."""
    weights: dict[str, list[float]]
    """Layer name -> softmax(a), a weight per rank."""
    steps: int
    seconds: float


class WeighedB(nn.Module):
    """The B slot while searching: h (..., k) -> (softmax(a) * h) B^T (..., out), with B `(out, k)` and a `(k,)`."""

    bias = None

    def __init__(self, B: nn.Parameter) -> None:
        super().__init__()
        self.B = B
        self.a = nn.Parameter(torch.ones(B.shape[1], device=B.device, dtype=B.dtype))

    @property
    def weight(self) -> Tensor:
        """B diag(softmax(a))."""
        return self.B * self.a.softmax(0)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight)


def rank_of(a: Tensor) -> int:
    """How many of the k ranks have a weight softmax(a) of at least 1/k: from 1 to k, and k where all are equal."""
    return int((a.detach().double().softmax(0) >= (1 - 1e-9) / len(a)).sum())


def search(
    model: PeftModel,
    train: Iterator[BatchLoss],
    validation: Iterator[BatchLoss],
    *,
    steps: int,
    lower_learning_rate: float,
    upper_learning_rate: float,
) -> Found:
    """Weigh the ranks of every LoRA layer of `model`, whose adapter is of no use afterwards.

    One step, on the next batch of each side: w' = w - Adam(L_tr); the hypergradient of a; back to w; Adam on a; a
    lower step with the new a.
    """
    began = time.perf_counter()
    layers = linear_slots(model)
    slots = [WeighedB(layer.b.weight) for layer in layers]
    lower = [factor for layer in layers for factor in (layer.a.A, layer.b.weight)]
    for layer, slot in zip(layers, slots, strict=True):
        layer.a.E.requires_grad_(False)
        fill(layer, layer.a, slot)
    upper = [slot.a for slot in slots]
    lower_optimizer = Adam(lower, lr=lower_learning_rate)
    upper_optimizer = Adam(upper, lr=upper_learning_rate, betas=(0.5, 0.999))
    model.train()
    for _ in range(steps):
        train_loss, val_loss = partial(next(train), model), partial(next(validation), model)

        def lower_step(loss: Callable[[], Tensor] = train_loss) -> None:
            _step(lower_optimizer, lower, gradients_of(loss(), lower))

        moments = {p: {key: value.clone() for key, value in s.items()} for p, s in lower_optimizer.state.items()}
        gradients = hypergradient(
            train_loss, val_loss, lower, upper, lower_step=lower_step, learning_rate=lower_learning_rate
        )
        lower_optimizer.state.clear()
        lower_optimizer.state.update(moments)
        _step(upper_optimizer, upper, gradients)
        lower_step()
    return Found(
        ranks={layer.name: rank_of(a) for layer, a in zip(layers, upper, strict=True)},
        weights={layer.name: a.detach().softmax(0).tolist() for layer, a in zip(layers, upper, strict=True)},
        steps=steps,
        seconds=time.perf_counter() - began,
    )


def prepare(request: Request, settings: AutoLoraSettings) -> Adaptation:
    """Search for a rank per layer, then LoRA from scratch at these ranks on all training rows, scaled by alpha / rank.

    The search sees dW = (alpha / k) B diag(softmax(a)) A, trains A and B (not the head) on 70 % of the training rows
    and a on the others. It takes place in here, before the run, and again on a resume; it has no budget but k.

    Departs from the authors' code, and why: a rank counts by softmax(a) >= 1/k, as in their second script (the first
    compares raw a, which the forward never uses); both ends of the finite difference see one draw of dropout, since
    that of two draws, divided by 2 eps, is noise.

    Raises:
        ValueError: too few rows to be split, lora.r of 1; DoRA, rsLoRA or another start.
    """
    refuse_lora(request, "AutoLoRA weighs the ranks of LoRA's own start", "init", "use_dora", "use_rslora")
    k = request.lora.r if settings.search_rank is None else settings.search_rank
    require(k >= 2, f"lora.r is {k}, which leaves AutoLoRA no choice; raise it, or give method_settings.search_rank")
    assert request.data is not None
    train, validation = request.data.parts(settings.validation_fraction)
    steps = settings.search_steps or request.steps
    model = with_lora(request, r=k)
    found = search(
        model,
        _losses(train),
        _losses(validation),
        steps=steps,
        lower_learning_rate=settings.lower_learning_rate,
        upper_learning_rate=settings.upper_learning_rate,
    )
    logger.info("AutoLoRA's search: %d steps, %.1f s, ranks %s", found.steps, found.seconds, found.ranks)
    base_model: Any = model.unload()  # type: ignore[operator]
    spent = {"search/steps": found.steps, "search/passes": PASSES_PER_STEP * found.steps}
    spent |= {"search/seconds": round(found.seconds, 3), "search/total_rank": sum(found.ranks.values())}
    config = with_ranks(request.lora, found.ranks)
    return Adaptation(model=with_adapter(base_model, config, request.seed), spent=spent)


def _step(optimizer: Optimizer, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


def _losses(data: Data) -> Iterator[BatchLoss]:
    """The loss on one batch after another."""
    return (partial(_loss, data, batch) for batch in data.batches())


def _loss(data: Data, batch: Any, model: nn.Module) -> Tensor:
    return data.loss(model, batch)


METHOD = Method("autolora", "ranks from a bilevel search, then LoRA (Zhang R. et al. 2024)", prepare, AutoLoraSettings)

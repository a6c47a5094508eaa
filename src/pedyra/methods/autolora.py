"""AutoLoRA (Zhang R. et al. 2024): a bilevel search weighs each layer's ranks; LoRA is trained at those that count."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from pedyra.allocate.contract import BatchLoss, Beginning, Method, Training, Work
from pedyra.allocate.schedule import check_count
from pedyra.errors import UserError
from pedyra.lora.layer import AdaptedLayer
from pedyra.methods.slots import OWN_START, Factors, Slot, fill, gradients_of, linear_slots, refuse_lora, write_plain

logger = logging.getLogger(__name__)

VALIDATION = 0.3
"""The part of the training rows that weighs the ranks, the authors' choice; held-out rows are never looked at."""
LOWER_RATE = UPPER_RATE = 3e-4
"""The learning rate of A and B while searching, and that of the weights of the ranks: the authors'."""


@dataclass(frozen=True, kw_only=True)
class AutoLora(Method):
    """AutoLoRA (Zhang R. et al. 2024): a bilevel search weighs each layer's ranks, and LoRA trains those that count.

    The search sees dW = (alpha / r) B diag(softmax(a)) A of the LoRA's r, trains A and B (not the head) on 70 % of the
    training rows and a on the others. About half of the ranks count, so for the size of a LoRA of rank 8 begin with 16.
    It takes place before the first step, and again on a resume. Then the LoRA begins anew at the ranks that were found,
    with the first rows of the A that it had, B = 0, and the scaling alpha / rank.

    Departs from the authors' code, and why: a rank counts by softmax(a) >= 1/r, as in their second script (the first
    compares raw a, which the forward never uses); both ends of the finite difference see one draw of dropout, since
    that of two draws, divided by 2 eps, is noise. Raises ValueError: too few rows to be split, a LoRA of r = 1; DoRA,
    rsLoRA or another start.
    """

    search_steps: int | None = None
    """Each costs five training steps. None: as many as the run has, which is about how long the authors search."""
    seed: int = 0
    """Seed of the dropout in the search."""

    in_processes = False

    def __post_init__(self) -> None:
        if self.search_steps is not None:
            check_count("search_steps", self.search_steps, 1)
        check_count("seed", self.seed, 0)

    @classmethod
    def at_budget(cls, rank: int) -> Beginning:
        return Beginning(2 * rank)

    def install(self, model: nn.Module, adapter: str = "default", training: Training | None = None) -> Work:
        refuse_lora(model, adapter, "AutoLoRA", (*OWN_START, "use_dora"))
        if training is None:
            raise UserError("AutoLoRA searches ranks on the rows of a training, and was given none; use pedyra.adapt")
        layers = linear_slots(model, adapter)
        if all(layer.rank < 2 for layer in layers):
            raise UserError("the LoRA has r = 1, and AutoLoRA keeps one rank of each layer; give it r = 2 or more")
        first = {layer: layer.a.A.detach().clone() for layer in layers}
        train, validation = training.losses(VALIDATION)
        mode = model.training
        with torch.random.fork_rng(devices=_devices([layer.a.A for layer in layers])):
            torch.manual_seed(self.seed)
            ranks = search(layers, model, train, validation, steps=self.search_steps or training.steps())
        model.train(mode)
        factors = {}
        for layer in layers:
            rank, B = ranks[layer.name], layer.module.lora_B[adapter].B
            scaling = layer.scaling * len(first[layer]) / rank
            factors[layer] = Factors(first[layer][:rank], torch.zeros_like(B[:, :rank]), scaling)
        write_plain(model, adapter, factors)
        return Work()


class WeighedB(Slot):
    """While searching the B slot maps h (..., k) -> (softmax(a) * h) B^T (..., out), with B `(out, k)` and a
    `(k,)`."""

    def __init__(self, B: nn.Parameter) -> None:
        super().__init__()
        self.B = B
        self.a = nn.Parameter(torch.ones(B.shape[1], device=B.device, dtype=B.dtype))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """B diag(softmax(a))"""
        return self.B * self.a.softmax(0)


def rank_of(a: Tensor) -> int:
    """Count the ranks, of k, that have a weight softmax(a) of at least 1/k: from 1 to k, and k where all are equal."""
    return int((a.detach().double().softmax(0) >= (1 - 1e-9) / len(a)).sum())


def search(
    layers: Sequence[AdaptedLayer],
    model: nn.Module,
    train: Iterator[BatchLoss],
    validation: Iterator[BatchLoss],
    *,
    steps: int,
) -> dict[str, int]:
    """Return layer name -> rank, for the layers of `linear_slots(model)`, which are of no use afterwards. One step:
    w' = w - Adam(L_tr); the hypergradient of a; back to w; Adam on a; a lower step with the new a."""
    slots = [WeighedB(layer.b.weight) for layer in layers]
    lower = [factor for layer in layers for factor in (layer.a.A, layer.b.weight)]
    for layer, slot in zip(layers, slots, strict=True):
        layer.a.E.requires_grad_(False)
        fill(layer, layer.a, slot)
    upper = [slot.a for slot in slots]
    lower_optimizer = Adam(lower, lr=LOWER_RATE)
    upper_optimizer = Adam(upper, lr=UPPER_RATE, betas=(0.5, 0.999))
    model.train()
    for _ in range(steps):
        train_loss, val_loss = partial(next(train), model), partial(next(validation), model)

        def lower_step(loss: Callable[[], Tensor] = train_loss) -> None:
            _step(lower_optimizer, lower, gradients_of(loss(), lower))

        moments = {p: {key: value.clone() for key, value in s.items()} for p, s in lower_optimizer.state.items()}
        gradients = hypergradient(train_loss, val_loss, lower, upper, lower_step=lower_step, learning_rate=LOWER_RATE)
        lower_optimizer.state.clear()
        lower_optimizer.state.update(moments)
        _step(upper_optimizer, upper, gradients)
        lower_step()
    if not all(bool(a.isfinite().all()) for a in upper):
        raise UserError(
            "AutoLoRA's search met a loss that is not finite, so it has found no ranks; look for rows without labels, "
            "or load the model in float32"
        )
    ranks = {layer.name: rank_of(a) for layer, a in zip(layers, upper, strict=True)}
    logger.info("AutoLoRA's search: %d steps, ranks %s", steps, ranks)
    return ranks


def hypergradient(
    train_loss: Callable[[], Tensor],
    val_loss: Callable[[], Tensor],
    lower: Sequence[nn.Parameter],
    upper: Sequence[nn.Parameter],
    *,
    lower_step: Callable[[], None],
    learning_rate: float,
) -> list[Tensor]:
    """Return dL_val(w'(a), a) / da with w' one lower step from w, by the finite difference of DARTS (Liu et al. 2019).

    dL_val/da (w') - eta (dL_tr/da (w + eps v) - dL_tr/da (w - eps v)) / (2 eps), with v = dL_val/dw (w'),
    eps = 0.01 / |v| and the learning rate eta: w' is taken as w - eta dL_tr/dw, whatever the optimizer of `lower_step`.
    Afterwards `lower` (w) has its values of before.
    """
    before = [parameter.detach().clone() for parameter in lower]
    lower_step()
    gradients = gradients_of(val_loss(), [*lower, *upper])
    v, direct = gradients[: len(lower)], gradients[len(lower) :]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part.float()) for part in v])).item()
    ends = []
    # At no slope at all the second term is 0 / 0, and its limit is zero.
    for eps in (0.01 / norm, -0.01 / norm) if norm > 0 else ():
        with torch.no_grad():
            for parameter, value, part in zip(lower, before, v, strict=True):
                parameter.copy_(value + eps * part)
        # The same dropout at both ends: divided by 2 eps, the difference of two draws would drown the derivative.
        with torch.random.fork_rng(devices=_devices(lower)):
            ends.append(gradients_of(train_loss(), upper))
    with torch.no_grad():
        for parameter, value in zip(lower, before, strict=True):
            parameter.copy_(value)
    if not ends:
        return direct
    scale = learning_rate * norm / 0.02
    return [here - scale * (plus - minus) for here, plus, minus in zip(direct, *ends, strict=True)]


def _devices(parameters: Sequence[nn.Parameter]) -> list[int]:
    return sorted({parameter.get_device() for parameter in parameters if parameter.is_cuda})


def _step(optimizer: Optimizer, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()

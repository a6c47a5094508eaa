"""The gain of a classifier's adapter is counted from the base model with a linear head that is fitted to it.

A head that is trained with the adapter is drawn at random in the base model, so the base alone knows nothing, and most
of the gain over it would be the head's. A linear head on the base's own features is what one has without a LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from pedyra.fitting.judge import Batch
from pedyra.fitting.modes import disabled
from pedyra.trainer.judge import TrainerJudge

STEPS = 100
"""LBFGS takes at most this number; the problem is convex."""
PENALTIES = (1.0, 10.0, 100.0, 1e3, 1e4)
"""On half of the squared weights, of features of variance 1: with hundreds of them and of rows 1 overfits."""
FOLDS = 4


def heads(model: nn.Module, adapter: str) -> list[nn.Module]:
    """List the modules that were trained in full beside the adapter's layers, in the order of the model."""
    wrappers = (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))
    return [module for module in wrappers if adapter in module.modules_to_save]


def base_with_head(
    trainer: Any, model: Any, batches: Sequence[Batch], adapter: str
) -> Callable[[], AbstractContextManager[None]] | None:
    """Return a context manager under which the model is its base, with a head that is fitted to these batches; None
    where no head was trained, or it does not give classes or a number for whole rows.

    The features are what the first of the trained modules is given, of the row's first token, or of its last where the
    head answers for each token; the head takes the place of what the last of them gives.
    """
    modules, judge = heads(model, adapter), TrainerJudge(trainer, model)
    if not modules or any(_labels(batch) is None for batch in batches):
        return None
    record: dict[str, Any] = {}

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and args and args[0].is_floating_point():  # embeddings are given token numbers
            if "features" not in record:
                record["first"], record["features"] = module, args[0].detach().float()
            record["last"], record["width"], record["dims"] = module, output.shape[-1], output.dim()

    features, labels = [], []
    with ExitStack() as stack, disabled(model), torch.no_grad():
        for module in modules:
            stack.enter_context(module.register_forward_hook(look))
        for batch in batches:
            record.pop("features", None)
            judge.forward(batch)
            if "features" not in record:
                return None
            features.append(_of_rows(record["features"], batch, record["dims"] == 3).cpu())
            labels.append(_labels(batch))
    weight, bias = fit_head(torch.cat(gather_object(features)), torch.cat(gather_object(labels)), record["width"])

    @contextmanager
    def base() -> Iterator[None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            record["features"] = args[0]

        def answer(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            values = record["features"]
            values = values[:, 0] if values.dim() == 3 and output.dim() == 2 else values
            return (values.float() @ weight.to(values.device).T + bias.to(values.device)).to(output.dtype)

        first, last = record["first"].register_forward_hook(keep), record["last"].register_forward_hook(answer)
        with first, last, disabled(model):
            yield

    return base


def _labels(batch: Batch) -> Tensor | None:
    """Return one label a row, on the CPU; None where rows have none, or several."""
    labels = batch.get("labels")
    return labels.cpu() if isinstance(labels, Tensor) and labels.dim() == 1 else None


def _of_rows(values: Tensor, batch: Batch, every_token: bool) -> Tensor:
    """Pick the features of each row from those of its tokens."""
    if values.dim() < 3:
        return values
    mask = batch.get("attention_mask")
    if not every_token or not isinstance(mask, Tensor):
        return values[:, 0]
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return values[torch.arange(len(values), device=values.device), last.to(values.device)]


def fit_head(features: Tensor, labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return weight `(width, n)` and bias `(width,)` of the logistic regression of features `(rows, n)` for classes,
    else of the ridge regression, with the penalty that does best on rows left out."""
    X = features.double()
    mean, scale = X.mean(0), X.std(0).clamp_min(1e-6)
    X = (X - mean) / scale
    y = labels.double()[:, None] if labels.is_floating_point() else labels
    fold = torch.randperm(len(X), generator=torch.Generator().manual_seed(0)) % FOLDS

    def loss(penalty: float) -> float:
        """Of rows that are left out in turn."""
        parts = [fold == number for number in range(FOLDS)]
        heads = [_regression(X[~part], y[~part], width, penalty) for part in parts]
        return sum(float(_loss(*head, X[part], y[part])) for head, part in zip(heads, parts, strict=True))

    weight, bias = _regression(X, y, width, min(PENALTIES, key=loss))
    weight = weight / scale
    return weight.float(), (bias - weight @ mean).float()


def _loss(weight: Tensor, bias: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """Sum the cross-entropy over rows, or half of the squared error."""
    values = X @ weight.T + bias
    if y.is_floating_point():
        return (values - y).square().sum() / 2
    return nn.functional.cross_entropy(values, y, reduction="sum")


def _regression(X: Tensor, y: Tensor, width: int, penalty: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(width, X.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(width, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = _loss(weight, bias, X, y) + penalty * weight.square().sum() / 2
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return weight.detach(), bias.detach()

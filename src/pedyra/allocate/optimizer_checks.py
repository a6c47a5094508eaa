"""Which optimizers can follow a rank change, and what is asked of their state: all said before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from pedyra.allocate.bitsandbytes_state import ABOUT_BLOCKS, is_bitsandbytes, is_packed
from pedyra.allocate.optimizer_state import FIRST_MOMENTS, LARGEST, OTHER_AVERAGES, SECOND_MOMENTS, row_keys

REPAIR = (
    "use optim='adamw_torch' or 'paged_adamw_8bit' (docs/works_with.md lists what works), or train plain LoRA with it "
    "and cut that afterwards: pedyra.fit"
)
_NOT_SEPARABLE = {
    "Adafactor": "factors its averages by rows and columns",
    "Muon": "makes each update of a whole matrix",
    "LBFGS": "keeps one flat history of all parameters",
    "ScheduleFree": "keeps a second copy of the weights, and what a new triple's is cannot be known",
    "GaLore": "keeps its averages in a projection of the whole gradient",
    "APOLLO": "keeps its averages in a projection of the whole gradient",
    "Lomo": "steps inside the backward pass, so that no gradient is ever complete",
    "RiemannianPreconditionedOptimizer": "knows the first pairs of A and B alone",
    "ZeroRedundancyOptimizer": "has each process keep the state of some of the old parameters",
}
"""Parts of the names of optimizers whose state is not separable by triples: to reset it would change the method."""


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside accelerate's wrapper, or the optimizer itself."""
    return getattr(optimizer, "optimizer", optimizer)


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse, before training, an optimizer whose state cannot follow a rank change.

    Raises:
        ValueError: naming the optimizer and what to use instead.
    """
    kind = type(optimizer)
    for base in kind.__mro__:
        for name, reason in _NOT_SEPARABLE.items():
            if name.lower() in base.__name__.lower():
                raise ValueError(f"{kind.__name__} {reason}, which cannot follow a rank change; {REPAIR}")
    if kind.__module__.startswith("torchao"):
        raise ValueError(f"{kind.__name__} of torchao packs its averages, which cannot follow a rank change; {REPAIR}")
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError(
            f"{kind.__name__} has maximize=True, but what triples are worth is told by a loss that falls; minimise the "
            f"negative of what you maximise"
        )
    if is_bitsandbytes(optimizer):
        if getattr(optimizer, "optimizer_name", "") == "ademamix":
            raise ValueError(f"{kind.__name__} keeps two averages in one, which cannot follow a rank change; {REPAIR}")
        if not getattr(getattr(optimizer, "args", None), "block_wise", True):  # of older versions
            raise ValueError(f"{kind.__name__} has block_wise=False, which cannot follow a rank change; leave it out")


def check_turnable(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Raise ValueError if the optimizer keeps more than averages of gradients and of their squares.

    Of other state of a parameter's shape (averages of updates) nobody knows how it turns with the rows.
    """
    for parameter in parameters:
        for key in _rowwise(optimizer, parameter) - {*FIRST_MOMENTS, *SECOND_MOMENTS, *LARGEST}:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key!r}, which cannot follow the turning of a layer's triples; "
                f"{REPAIR}"
            )


def check_state(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Raise ValueError if some state of these parameters cannot follow a rank change; changes nothing.

    It must be a scalar, or row-wise and an average, which begins at zero for a new row. A copy of the weights
    (schedule-free optimizers) does not: from zero it would draw the new row there.
    """
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if is_packed(optimizer, state) and ABOUT_BLOCKS.fullmatch(key):
                continue
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}; state that is not row-wise cannot follow a rank change: {REPAIR}"
                )
        for key in _rowwise(optimizer, parameter) - {*FIRST_MOMENTS, *SECOND_MOMENTS, *LARGEST, *OTHER_AVERAGES}:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key!r}, and what a new triple's is cannot be known; {REPAIR}"
            )


def _rowwise(optimizer: Optimizer, parameter: Tensor) -> set[str]:
    """Keys of the state that has the parameter's shape."""
    return {*row_keys(optimizer, parameter, parameter.shape)}

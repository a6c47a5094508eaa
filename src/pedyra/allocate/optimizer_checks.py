"""Which optimizers can follow a rank change, and what is asked of their state: all said before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from pedyra.allocate.optimizer_state import FIRST_MOMENTS, LARGEST, OTHER_AVERAGES, SECOND_MOMENTS

# Factored or orthogonalised state is not separable by triples; silently resetting it would change the method.
_NOT_SEPARABLE = {
    "Adafactor": "use adamw_torch, or any optimizer whose state has the parameters' shape",
    "Muon": "use adamw_torch, or any optimizer whose state has the parameters' shape",
    "LBFGS": "use adamw_torch: LBFGS keeps one flat history of all parameters",
    "RiemannianPreconditionedOptimizer": "use adamw_torch: it knows the first pairs of A and B alone",
    "ZeroRedundancyOptimizer": "use adamw_torch: each process would keep the state of some of the old parameters",
}


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
        if base.__name__ in _NOT_SEPARABLE:
            repair = _NOT_SEPARABLE[base.__name__]
            raise ValueError(f"the state of {kind.__name__} cannot follow a rank change; {repair}")
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError(
            f"{kind.__name__} has maximize=True, but what triples are worth is told by a loss that falls; minimise the "
            f"negative of what you maximise"
        )
    bits = getattr(getattr(optimizer, "args", None), "optim_bits", 32)
    if kind.__module__.startswith("bitsandbytes") and bits != 32:
        raise ValueError(
            f"{kind.__name__} keeps its moments in blocks of 256 values at {bits} bits, which cannot follow a rank "
            f"change; use optim='adamw_torch' (adapters are small: it costs little), or train plain LoRA and cut it "
            f"afterwards: pedyra.fit"
        )
    if getattr(optimizer, "is_paged", False):
        raise ValueError(
            f"{kind.__name__} keeps its moments in pages that CPU and GPU share, which do not follow a rank change; "
            f"use optim='adamw_torch' (adapters are small: it costs little), or train plain LoRA and cut it "
            f"afterwards: pedyra.fit"
        )


def check_turnable(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Raise ValueError if the optimizer keeps more than averages of gradients and of their squares.

    Of other state of a parameter's shape (averages of updates) nobody knows how it turns with the rows.
    """
    for parameter in parameters:
        for key in _rowwise(optimizer, parameter) - {*FIRST_MOMENTS, *SECOND_MOMENTS, *LARGEST}:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key!r}, which cannot follow the turning of a layer's triples; "
                f"use adamw_torch"
            )


def check_state(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Raise ValueError if some state of these parameters cannot follow a rank change; changes nothing.

    It must be a scalar, or row-wise and an average, which begins at zero for a new row. A copy of the weights
    (schedule-free optimizers) does not: from zero it would draw the new row there.
    """
    for parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}; state that is not row-wise cannot follow a rank change: use "
                    f"adamw_torch"
                )
        for key in _rowwise(optimizer, parameter) - {*FIRST_MOMENTS, *SECOND_MOMENTS, *LARGEST, *OTHER_AVERAGES}:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key!r}, and what a new triple's is cannot be known; use adamw_torch"
            )


def _rowwise(optimizer: Optimizer, parameter: Tensor) -> set[str]:
    """Keys of the state that has the parameter's shape."""
    state = optimizer.state.get(parameter, {}).items()
    return {key for key, value in state if isinstance(value, Tensor) and value.dim() and value.shape == parameter.shape}

"""An optimizer's state by triples: which optimizers can follow a rank change, and how their state follows its rows.

A parameter of 4,096 elements or more has, under bitsandbytes' 8-bit optimizers, one byte an element, an index into a
table (`qmap1`, `qmap2`), and the largest number of each block of 256 elements in a row (`absmax1`, `absmax2`). Rows of
a factor do not end where blocks do, so that a block has to be unpacked before one of its rows can go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pedyra.errors import UserError
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.replacement import Replacement, select_rows

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

MOMENTS = {
    **dict.fromkeys(("exp_avg", "momentum_buffer", "grad_avg", "state1"), 1),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "state2"), 2),
}
"""Averages of gradients (Adam family and Lion, SGD, centred RMSprop, bitsandbytes' first): 1; of their squares (Adam
family and RMSprop, Adagrad's "sum", bitsandbytes' second): 2. `_power` has the exceptions."""

BLOCK = 256
ABOUT_BLOCKS = {"qmap1", "qmap2", "absmax1", "absmax2"}
"""Entries of the state that describe the bytes of another one."""


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the torch optimizer inside accelerate's wrapper, or the optimizer itself."""
    return getattr(optimizer, "optimizer", optimizer)


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise ValueError for an optimizer whose state cannot follow a rank change, with its name and what to use."""
    kind = type(optimizer)
    for base in kind.__mro__:
        for name, reason in _NOT_SEPARABLE.items():
            if name.lower() in base.__name__.lower():
                raise UserError(f"{kind.__name__} {reason}, which cannot follow a rank change; {REPAIR}")
    if kind.__module__.startswith("torchao"):
        raise UserError(f"{kind.__name__} of torchao packs its averages, which cannot follow a rank change; {REPAIR}")
    if is_bitsandbytes(optimizer) and getattr(optimizer, "optimizer_name", "") == "ademamix":
        raise UserError(f"{kind.__name__} keeps two averages in one, which cannot follow a rank change; {REPAIR}")


def check_state(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Raise ValueError if some state of these parameters is no scalar and no average of gradients or of their squares,
    which begins at zero for a new row: a copy of the weights (schedule-free optimizers) would draw it to zero."""
    for parameter in parameters:
        for key, value in _values(optimizer, parameter).items():
            flaw = None
            if not isinstance(value, (Tensor, bool, int, float, str, NoneType)):
                flaw = f", a {type(value).__name__} whose rows are unknown, and so it cannot follow a rank change"
            elif isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                flaw = (
                    f" of shape {tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}; state that is "
                    f"not row-wise cannot follow a rank change"
                )
            elif _has_rows(value, parameter.shape) and key not in MOMENTS:
                flaw = ", and what a new triple's is cannot be known"
            if flaw is not None:
                raise UserError(f"{type(optimizer).__name__} keeps {key!r}{flaw}; {REPAIR}")


def adopt(optimizer: Optimizer, layer: AdaptedLayer) -> None:
    """Put the layer's E, if it is trained, into the param group of its B, as LoRA+ does; behind A, if that is there.

    A checkpoint then fits that of an optimizer built after `attach`, and `add_param_group` would break schedulers. An E
    that some group holds already stays there. Raises ValueError: as `check_held`.
    """
    check_held(optimizer, [layer])
    A, E, B = layer.factors
    if not E.requires_grad or _group_of(optimizer, E) is not None:
        return
    group = _group_of(optimizer, B)
    assert group is not None
    place = next((place for place, each in enumerate(group["params"], start=1) if each is A), len(group["params"]))
    group["params"].insert(place, E)
    if "param_names" in group:
        group["param_names"].insert(place, f"{layer.name}.lora_A.{layer.adapter}.E")


def check_held(optimizer: Optimizer, layers: Sequence[AdaptedLayer]) -> None:
    """Raise ValueError where no group of the optimizer holds a layer's A, or none its B; changes nothing."""
    ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in layers:
        A, _, B = layer.factors
        for factor, parameter in (("lora_A", A), ("lora_B", B)):
            if id(parameter) not in ids:
                raise UserError(
                    f"the optimizer does not hold {factor} of {layer.name}; build one from all parameters of the model "
                    f"with its adapter, after get_peft_model"
                )


def _group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    holding = (group for group in optimizer.param_groups if any(each is parameter for each in group["params"]))
    return next(holding, None)


@torch.no_grad()
def move_state(optimizer: Optimizer, replacements: Sequence[Replacement]) -> None:
    """Replace the old Parameters by the new ones, in place in their groups, and slice their state with the kept rows.

    New rows start with zero moments. Under Adam's old step count their first updates are of two learning rates where
    gradients are noise, and of up to six where they are constant. With the second moment of the kept rows, whose
    gradients are far larger, a new row would hardly move for hundreds of steps. Call `check_state` first.
    """
    rekey_state(optimizer, {replacement.old: replacement.new for replacement in replacements})
    for replacement in replacements:
        new, moved = replacement.new, {}
        for key, value in _values(optimizer, new).items():
            if _has_rows(value, replacement.old.shape):
                value = dequantize(optimizer.state[new], key, new.device) if value.dtype == torch.uint8 else value
                rows = select_rows(value, replacement.dim, replacement.indices, replacement.num_new)
                moved[key] = rows * replacement.divisor ** _power(optimizer, new, key)
        if moved and is_bitsandbytes(optimizer):
            renew(optimizer, new, moved)
        elif moved:
            optimizer.state[new].update(moved)


def _power(optimizer: Optimizer, parameter: Tensor, key: str) -> int:
    """Return the power of a gradient's size that this entry of the state has."""
    if key == "momentum_buffer" and "square_avg" in optimizer.state[parameter]:  # RMSprop's is of its steps
        return 0
    if key == "state1" and getattr(optimizer, "optimizer_name", "") in ("rmsprop", "adagrad"):  # bitsandbytes
        return 2
    return MOMENTS[key]


def _values(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """Return the state of `parameter` by name, without what describes bytes."""
    return {key: value for key, value in optimizer.state.get(parameter, {}).items() if key not in ABOUT_BLOCKS}


def _has_rows(value: Any, shape: torch.Size) -> bool:
    """Tell whether it has a row for each triple of a parameter of this shape."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == shape


def rekey_state(optimizer: Optimizer, successors: Mapping[Tensor, Tensor]) -> None:
    """Put each successor in the place of its Parameter, in the groups and, with its state untouched, in the state."""
    for group in optimizer.param_groups:
        group["params"][:] = [successors.get(parameter, parameter) for parameter in group["params"]]
    for old, new in successors.items():
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)


def drop_unfit_state(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Forget the state of parameters that have another shape now: they go on as an optimizer's new ones."""
    for parameter in parameters:
        tensors = [value for value in _values(optimizer, parameter).values() if isinstance(value, Tensor)]
        if any(tensor.dim() and tensor.shape != parameter.shape for tensor in tensors):
            del optimizer.state[parameter]


class TrainedTriples:
    """A, E and B of these layers as the optimizer holds them, which may lag behind the model after a load."""

    def __init__(self, layers: Sequence[AdaptedLayer], optimizer: Optimizer) -> None:
        self.layers, self.optimizer = layers, optimizer
        self.hold()

    @property
    def now(self) -> list[Tensor]:
        """Return A, E, B of every layer as they are in the model; E may be no Parameter, see `AFactor.train_e`."""
        return [factor for layer in self.layers for factor in layer.factors]

    def hold(self) -> None:
        """Note that the optimizer has what is in the model."""
        self._optimizer_factors, self.is_new = self.now, True
        # Parameters by the dicts that modules keep them in: a tenth of the time of their attributes, in every step.
        self._slots = [(layer.a._parameters, layer.a.A) for layer in self.layers]
        self._slots += [(layer.b._parameters, layer.b.weight) for layer in self.layers]

    def rekey(self) -> bool:
        """Point the optimizer at Parameters that a load has put in the place of those it holds. Returns whether any has
        another rank: of the same rank 0 there is a new one too, which was loaded by way of a zero row."""
        if all(slot["weight"] is parameter for slot, parameter in self._slots):
            return False
        loaded = {old: new for old, new in zip(self._optimizer_factors, self.now, strict=True) if old is not new}
        rekey_state(self.optimizer, loaded)
        drop_unfit_state(self.optimizer, list(loaded.values()))
        self.hold()
        return any(old.numel() or new.numel() for old, new in loaded.items())


def is_bitsandbytes(optimizer: Optimizer) -> bool:
    kinds = type(optimizer).__mro__
    return any(kind.__name__ == "Optimizer8bit" and kind.__module__.startswith("bitsandbytes") for kind in kinds)


def dequantize(state: Mapping[str, Any], key: str, device: torch.device) -> Tensor:
    """Return the numbers of `state[key]`, in float32 on `device`: pages are on neither device to torch."""
    from bitsandbytes.functional import dequantize_blockwise

    absmax, code = (state[f"{name}{key[-1]}"].to(device) for name in ("absmax", "qmap"))
    return dequantize_blockwise(state[key].to(device), absmax=absmax, code=code, blocksize=BLOCK)


def renew(optimizer: Any, parameter: Tensor, values: Mapping[str, Tensor]) -> None:
    """Have bitsandbytes make the state of `parameter`, in bytes or not, as its shape is now, and put in these numbers.
    It never frees a page, so that the new state of a paged optimizer is in ordinary memory, as after a load."""
    from bitsandbytes.functional import quantize_blockwise

    old, pages = optimizer.state[parameter], optimizer.is_paged
    of_group, group, place = next(
        (number, group, place)
        for number, group in enumerate(optimizer.param_groups)
        for place, each in enumerate(group["params"])
        if each is parameter
    )
    optimizer.state[parameter], optimizer.is_paged = {}, False
    try:
        optimizer.init_state(group, parameter, of_group, place)
    finally:
        optimizer.is_paged = pages
    new = optimizer.state[parameter]
    for key, value in values.items():
        if new[key].dtype == torch.uint8:
            number = key[-1]
            packed, constants = quantize_blockwise(value.float(), code=new[f"qmap{number}"], blocksize=BLOCK)
            new[key].copy_(packed)
            new[f"absmax{number}"].copy_(constants.absmax)
        else:
            new[key].copy_(value)
    new.update({key: value for key, value in old.items() if key not in values and key not in ABOUT_BLOCKS})

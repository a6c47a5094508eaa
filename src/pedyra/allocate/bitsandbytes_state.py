"""The state that bitsandbytes' optimizers keep, in numbers: unpacked from 8 bits, and packed again.

A parameter of 4,096 elements or more has, under its 8-bit optimizers, one byte an element, an index into a table
(`qmap1`, `qmap2`), and the largest number of each block of 256 elements in a row (`absmax1`, `absmax2`). Rows of a
factor do not end where blocks do, so that a block has to be unpacked before one of its rows can go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

BLOCK = 256
ABOUT_BLOCKS = re.compile(r"(qmap|absmax)[12]")
"""Entries of the state that describe the bytes of another one."""


def is_bitsandbytes(optimizer: Optimizer) -> bool:
    return any(
        base.__name__ == "Optimizer8bit" and base.__module__.startswith("bitsandbytes")
        for base in type(optimizer).__mro__
    )


def is_packed(optimizer: Optimizer, state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state is in bytes."""
    return is_bitsandbytes(optimizer) and "absmax1" in state


def unpack(state: Mapping[str, Any], key: str, device: torch.device) -> Tensor:
    """The numbers of `state[key]`, in float32 on `device`: pages that CPU and GPU share are on neither to torch."""
    from bitsandbytes.functional import dequantize_blockwise

    absmax, code = (state[f"{name}{key[-1]}"].to(device) for name in ("absmax", "qmap"))
    return dequantize_blockwise(state[key].to(device), absmax=absmax, code=code, blocksize=BLOCK)


def renew(optimizer: Any, parameter: Tensor, values: Mapping[str, Tensor]) -> None:
    """Have bitsandbytes make the state of `parameter`, whose shape may be another now, and put these numbers into it.

    It decides, by the number of elements and its own overrides, whether the state is in bytes. It never frees a page,
    so that the new state of a paged optimizer is in ordinary memory, as it is after a checkpoint was loaded.
    """
    from bitsandbytes.functional import quantize_blockwise

    old, pages = optimizer.state[parameter], optimizer.is_paged
    of_group, place = _place_of(optimizer, parameter)
    optimizer.state[parameter] = {}
    optimizer.is_paged = False
    try:
        optimizer.init_state(optimizer.param_groups[of_group], parameter, of_group, place)
    finally:
        optimizer.is_paged = pages
    new = optimizer.state[parameter]
    for key, value in values.items():
        if new[key].dtype == torch.uint8:
            number = key[-1]
            packed, made = quantize_blockwise(value.float(), code=new[f"qmap{number}"], blocksize=BLOCK)
            new[key].copy_(packed)
            new[f"absmax{number}"].copy_(made.absmax)
        else:
            new[key].copy_(value)
    new.update({key: value for key, value in old.items() if key not in values and not ABOUT_BLOCKS.fullmatch(key)})


def _place_of(optimizer: Optimizer, parameter: Tensor) -> tuple[int, int]:
    """Its group's index, and its own in there."""
    for of_group, group in enumerate(optimizer.param_groups):
        for place, held in enumerate(group["params"]):
            if held is parameter:
                return of_group, place
    raise AssertionError("the optimizer has the state of a parameter that it does not hold")

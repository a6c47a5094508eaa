"""From a factor in memory to what is on disk, and back; and the Parameter that takes another's place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def as_saved(weight: Tensor, origin: Tensor | None, dim: int) -> Tensor:
    """What goes to disk: the rows, then what they began as; a zero row for rank 0, which PEFT could not load."""
    if origin is not None and origin.shape[dim]:
        return torch.cat([weight, origin.to(weight)], dim)
    if weight.shape[dim] == 0:
        shape = list(weight.shape)
        shape[dim] = 1
        return weight.new_zeros(shape)
    return weight


ANOTHER_START = "the weight does not end with the start (PiSSA, OLoRA) of this model; load it into a fresh base"


def apart(weight: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    """The inverse of `as_saved` for triples with an origin: values and origin; None for that where it has none."""
    count = weight.shape[dim]
    if count == 1 and not weight.any():
        return weight.narrow(dim, 0, 0), weight.narrow(dim, 0, 0)
    values, origin = weight.narrow(dim, 0, count // 2), weight.narrow(dim, count // 2, count - count // 2)
    return values, origin if origin.shape == values.shape else None


def renewed(old: Tensor, value: Tensor) -> Tensor:
    """A new Parameter with `value`, trained or not as the old one, and with its hooks and whatever else a user has hung
    on it; for a plain tensor, the value itself."""
    if not isinstance(old, nn.Parameter):
        return value
    new: Any = nn.Parameter(value, requires_grad=old.requires_grad)
    # But not torch.compile's marks: those of ranks 0 and 1 are others.
    new.__dict__.update({k: v for k, v in old.__dict__.items() if "dynamo" not in k and k != "_specialize_on"})
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(old, hooks, None):
            setattr(new, hooks, getattr(old, hooks))
    return new


def loaded(old: Tensor, value: Tensor, local_metadata: dict) -> Any:
    """The old tensor with the value in it where that fits, as torch's modules load, for an optimizer holds it;
    else `renewed`, on the old one's device (or the value's, when assigning) and of its dtype."""
    assign = local_metadata.get("assign_to_params_buffers", False) or old.device.type == "meta"
    if not assign and value.shape == old.shape:
        with torch.no_grad():
            return old.copy_(value)
    device = value.device if assign else old.device
    return renewed(old, value.detach().to(device=device, dtype=old.dtype, copy=True))

"""From a factor in memory to what is on disk, and back; and the Parameter that takes another's place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def as_saved(weight: Tensor, origin: Tensor | None, dim: int) -> Tensor:
    """What goes to disk: the live rows, then the origin's; a zero row for rank 0, which PEFT could not load."""
    if origin is not None:
        return torch.cat([weight, origin.to(weight)], dim)
    if weight.shape[dim] == 0:
        shape = list(weight.shape)
        shape[dim] = 1
        return weight.new_zeros(shape)
    return weight


def as_live(weight: Tensor, origin: Tensor | None, *, dim: int, key: str, error_msgs: list[str]) -> Tensor | None:
    """The inverse of `as_saved`; None, with a message, when the origin in the file is not this model's."""
    if origin is None:
        return weight
    live = weight.shape[dim] - origin.shape[dim]
    if live < 0 or not torch.allclose(weight.narrow(dim, live, origin.shape[dim]).to(origin), origin, atol=1e-4):
        error_msgs.append(f"{key} does not end with the start (PiSSA, OLoRA) of this model; load it into a fresh base")
        return None
    return weight.narrow(dim, 0, live)


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

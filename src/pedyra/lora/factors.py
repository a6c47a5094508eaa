"""The two slots of a PEFT LoRA layer hold triples: `AFactor` has A and E, `BFactor` has B.

On disk both are the plain `weight` of an ordinary LoRA: E is folded into A. In memory they take any rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def as_saved(weight: Tensor, origin: Tensor | None, dim: int) -> Tensor:
    """Return the tensor that is saved: the rows, then their initial values; a row of zeros for rank 0, which PEFT
    cannot load."""
    if origin is not None and origin.shape[dim]:
        return torch.cat([weight, origin.to(weight)], dim)
    return weight if weight.shape[dim] else weight.new_zeros([size or 1 for size in weight.shape])


ANOTHER_START = "the weight does not end with the start (PiSSA, OLoRA) of this model; load it into a fresh base"


def as_read(weight: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    """Undo `as_saved` for triples with an origin: the values and their initial values, None where the file has none."""
    count = weight.shape[dim]
    if count % 2:  # the row of zeros, or a plain LoRA
        empty = weight.narrow(dim, 0, 0)
        return empty, empty if count == 1 and not weight.any() else None
    values, origin = weight.chunk(2, dim)
    return values, origin


@dataclass
class Start:
    """A start of PEFT (PiSSA) gave one layer these triples, and took them from its weight."""

    A: Tensor
    """`(r, in)`, with E in it."""
    B: Tensor
    """`(out, r)`, with the scaling in it."""
    weight: Tensor | None = None
    """A copy on the host of the base weight that the start left, made when the first triple is pruned. Later weights
    are computed from it, so that they do not depend on the order of pruning, and a resumed run has the same bits."""


class AFactor(nn.Module):
    """The `lora_A` slot maps x (..., in) to x (E A)^T (..., r), with A `(r, in)` and E `(r,)`.

    Where PEFT's start took from the weight (PiSSA), the state dict holds the update of the weight as it was before:
    [E A; A0] `(2 r, in)`, against [B, -B0] in the other slot, and loading takes the two apart again.
    """

    E: Tensor
    """A Parameter where it is trained, else a plain tensor; see `train_e`."""
    origin: Tensor | None
    """A0 `(r, in)`, the initial value of each row, with E in it; see `lora.start`."""
    start: Start | None = None
    loaded_origin: Tensor | None = None
    """The `origin` of a loaded state dict, until `start.follow_loaded` has adjusted the base weight to it."""
    bias = None  # an nn.Linear's attribute that PEFT reads

    doubling: tuple[int, float] | None = None
    """The rank and the scaling of the start, of which each doubling of the rank halves the scaling; see
    `AdaptedLayer.share_at`. None: the scaling stays."""
    e_fixed_at_one = False
    """E is 1 and not trained, so that the forward leaves it out and has the bits and the time of a plain LoRA."""

    def __init__(self, A: nn.Parameter, E: nn.Parameter) -> None:
        super().__init__()
        self.replace(A, E)
        self.register_buffer("origin", None, persistent=False)

    def replace(self, A: nn.Parameter, E: Tensor) -> None:
        """Set A and E, at any rank. A is the Parameter named `weight`, as in a plain LoRA, for code that reads weights
        by the names of Parameters (to save them, to keep the best, to copy an adapter)."""
        self._parameters["weight"] = A
        self.E = E

    @property
    def A(self) -> nn.Parameter:
        """`(r, in)`."""
        return self._parameters["weight"]  # type: ignore[return-value]

    def train_e(self, on: bool) -> None:
        """Train E where A is trained, or never: then it is a plain tensor, because PEFT makes every Parameter of an
        adapter trainable when it is made active (`set_adapter`) and after `with model.disable_adapter()`, as in each
        step of a preference loss, and DistributedDataParallel broadcasts buffers in every forward."""
        if on == isinstance(self.E, nn.Parameter):
            self.E.requires_grad_(on and self.A.requires_grad)
            return
        value = self.E.detach()
        del self.E
        self.E = nn.Parameter(value, requires_grad=self.A.requires_grad) if on else value

    def _apply(self, fn: Any, recurse: bool = True) -> AFactor:
        super()._apply(fn, recurse)
        if not isinstance(self.E, nn.Parameter):
            self.E = fn(self.E)
        return self

    @property
    def weight(self) -> Tensor:
        """E A, `(r, in)`, the weight of the ordinary LoRA; differentiable. Where E is fixed at 1 this is A itself, so
        that writing into it (hot-swapping, averages of weights) works; elsewhere writing into it changes nothing."""
        return self.A if self.e_fixed_at_one else self.E.unsqueeze(1) * self.A

    def identity_e(self, rank: int) -> Tensor:
        """Return the E with which `weight` is A."""
        return torch.ones(rank)

    @property
    def in_features(self) -> int:
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        return self.A.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        # This takes one product of r x in, not of tokens x r, and keeps no activation for the gradient of E.
        return F.linear(x, self.weight)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        weight = self.weight if keep_vars else self.weight.detach()
        destination[prefix + "weight"] = as_saved(weight, self.origin, dim=0)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        weight = loaded_weight(self, 0, state_dict, prefix, missing_keys, error_msgs)
        if weight is not None:
            # Parameters that were kept by their names have E beside A, and a state dict has their product.
            E = state_dict.get(prefix + "E") if isinstance(self.E, nn.Parameter) else None
            A, E = self.split_weight(weight) if E is None else (weight, E)
            self.replace(load_into(self.A, A, local_metadata), load_into(self.E, E, local_metadata))

    def split_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Split a loaded `weight` `(r, in)` into A `(r, in)` and E `(r,)` with weight = E A, up to rounding.

        Where E is trained, each row of A keeps its norm, and E its sign, on which Eq. (2) and the optimizer's averages
        depend: a callback may load other weights for an evaluation and then the original ones. A row of zeros gives
        E = 0 and keeps the row of A. At another rank, and for rows that are not finite, E is 1 and A is the weight.
        """
        live = self.A.detach()
        if not isinstance(self.E, nn.Parameter) or live.is_meta or len(weight) != len(live):
            return weight, self.identity_e(len(weight))
        weight = weight.to(live)
        lengths, new_lengths = (torch.linalg.vector_norm(rows.float(), dim=1) for rows in (live, weight))
        E = (torch.where(torch.signbit(self.E.detach()), -1.0, 1.0) * new_lengths / lengths).to(self.E)
        empty = new_lengths == 0
        valid = lengths.isfinite() & E.isfinite() & ((E != 0) | empty)
        A = torch.where(empty[:, None], live, weight / E[:, None].to(live))
        return torch.where(valid[:, None], A, weight), E.where(valid, 1.0)


class BFactor(nn.Linear):
    """The `lora_B` slot is an `nn.Linear` `(out, r)` whose rank may change."""

    origin: Tensor | None
    """B0 `(out, r)`, as in `AFactor`; so are the next two."""
    start: Start | None = None
    loaded_origin: Tensor | None = None
    weight: nn.Parameter

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.weight = weight
        self.bias = bias
        self.out_features = weight.shape[0]
        self.register_buffer("origin", None, persistent=False)

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return self.weight.shape[1]

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        weight = self.weight if keep_vars else self.weight.detach()
        destination[prefix + "weight"] = as_saved(weight, None if self.origin is None else -self.origin, dim=1)
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        weight = loaded_weight(self, 1, state_dict, prefix, missing_keys, error_msgs)
        if weight is not None:
            self.weight = load_into(self.weight, weight, local_metadata)
        if self.bias is not None and prefix + "bias" in state_dict:
            self.bias = load_into(self.bias, state_dict[prefix + "bias"], local_metadata)


def loaded_weight(
    factor: AFactor | BFactor, dim: int, state_dict: Any, prefix: str, missing_keys: list[str], error_msgs: list[str]
) -> Tensor | None:
    """Read the `weight` of a slot, whose ranks are along `dim`, without its initial values, which become the slot's
    `loaded_origin`; None where it is missing, does not fit, or is that of the slot, whose split into A and E stays."""
    weight, current = state_dict.get(prefix + "weight"), as_saved(factor.weight.detach(), None, dim)
    if weight is None:
        missing_keys.append(prefix + "weight")
        return None
    if weight.shape[1 - dim] != current.shape[1 - dim]:
        error_msgs.append(f"{prefix}weight has {tuple(weight.shape)}, not {('(r, in)', '(out, r)')[dim]} here")
        return None
    if factor.start is not None:
        weight, origin = as_read(weight, dim)
        if origin is None:
            error_msgs.append(f"{prefix}weight: {ANOTHER_START}")
            return None
        factor.loaded_origin = -origin if dim else origin
    return None if weight.shape == current.shape and torch.equal(weight, current.to(weight)) else weight


def linear(weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Linear:
    """Make an ordinary `nn.Linear` of these very Parameters; the rank is 1 or more."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = weight
    if bias is not None:
        module.bias = bias
    return module


def successor(old: Tensor, value: Tensor) -> Tensor:
    """Make a new Parameter of `value` with the old one's `requires_grad`, hooks and attributes; where `old` is a plain
    tensor, return the value itself."""
    if not isinstance(old, nn.Parameter):
        return value
    new: Any = nn.Parameter(value, requires_grad=old.requires_grad)
    # But not torch.compile's marks: those of ranks 0 and 1 are others.
    new.__dict__.update({k: v for k, v in old.__dict__.items() if "dynamo" not in k and k != "_specialize_on"})
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(old, hooks, None):
            setattr(new, hooks, getattr(old, hooks))
    return new


def load_into(old: Tensor, value: Tensor, local_metadata: dict) -> Any:
    """Copy the value into the old tensor where the shapes agree, as torch's modules do, because an optimizer holds that
    tensor; else return its `successor`, on the old device (the value's, when assigning) and of the old dtype."""
    assign = local_metadata.get("assign_to_params_buffers", False) or old.device.type == "meta"
    if not assign and value.shape == old.shape:
        with torch.no_grad():
            return old.copy_(value)
    device = value.device if assign else old.device
    return successor(old, value.detach().to(device=device, dtype=old.dtype, copy=True))

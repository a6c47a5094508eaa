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
    """Return what goes to disk: the rows, then what they began as; or a row of zeros, since PEFT loads no rank 0."""
    if origin is not None and origin.shape[dim]:
        return torch.cat([weight, origin.to(weight)], dim)
    if weight.shape[dim] == 0:
        shape = list(weight.shape)
        shape[dim] = 1
        return weight.new_zeros(shape)
    return weight


ANOTHER_START = "the weight does not end with the start (PiSSA, OLoRA) of this model; load it into a fresh base"


def as_read(weight: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    """Undo `as_saved` for triples with an origin: values and origin, which is None where the file has none."""
    count = weight.shape[dim]
    if count == 1 and not weight.any():
        return weight.narrow(dim, 0, 0), weight.narrow(dim, 0, 0)
    values, origin = weight.narrow(dim, 0, count // 2), weight.narrow(dim, count // 2, count - count // 2)
    return values, origin if origin.shape == values.shape else None


@dataclass
class Start:
    """The triples of one layer began as these, beside this weight."""

    A: Tensor
    """`(r, in)`, with E in it."""
    B: Tensor
    """`(out, r)`, with the scaling in it."""
    weight: Tensor | None = None
    """The base weight beside them is kept on the host once the layer's own is another one, which is always made from
    it: so it depends on which triples are left and not on the order in which others went, and a resumed run has it to
    the last bit."""


class AFactor(nn.Module):
    """The `lora_A` slot maps x (..., in) to x (E A)^T (..., r), with A `(r, in)` and E `(r,)`.

    Where PEFT's start took from the weight (PiSSA), the state dict holds the update of the weight as it was before:
    [E A; A0] `(2 r, in)`, against [B, -B0] in the other slot, and loading takes the two apart again.
    """

    E: Tensor
    """A Parameter where it is trained, else a plain tensor; see `train_e`."""
    origin: Tensor | None
    """A0 `(r, in)`, what each row began as, with E in it; see `lora.start`."""
    start: Start | None = None
    loaded_origin: Tensor | None = None
    """The `origin` of a loaded state waits here until `start.follow_loaded` has brought the base weight in line."""
    bias = None  # an nn.Linear's attribute that PEFT reads

    e_fixed_at_one = False
    """E is 1 and not trained, so the forward leaves it out: to the last bit, and in its time, a plain LoRA's."""

    def __init__(self, A: nn.Parameter, E: nn.Parameter) -> None:
        super().__init__()
        self.replace(A, E)
        self.register_buffer("origin", None, persistent=False)

    def replace(self, A: nn.Parameter, E: Tensor) -> None:
        """Put these in the place of A and E, at any rank.

        The Parameter A is called `weight`, as in a plain LoRA, for those who take weights by the names of Parameters
        (to save them, to keep the best, to copy an adapter); where E is trained, it stands beside it.
        """
        self._parameters["weight"] = A
        self.E = E

    @property
    def A(self) -> nn.Parameter:
        """`(r, in)`."""
        return self._parameters["weight"]  # type: ignore[return-value]

    def train_e(self, on: bool) -> None:
        """Have E trained where A is, or not at all.

        It is a plain tensor then: PEFT makes every Parameter of an adapter trainable, frozen or not, when it is made
        active (`set_adapter`) and at the end of `with model.disable_adapter()`, as in each step of a preference loss;
        and buffers are broadcast in every forward under DistributedDataParallel.
        """
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
        """E A, `(r, in)`: what an ordinary LoRA would hold. Differentiable.

        A itself where E is fixed at 1, so that writing into it (hot-swapping, averages of weights) does what it does to
        an ordinary LoRA. Elsewhere it is computed, and writing into it changes nothing.
        """
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
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            missing_keys.append(prefix + "weight")
            return
        if weight.shape[1] != self.in_features:
            error_msgs.append(f"{prefix}weight has {tuple(weight.shape)}, not (r, in) here")
            return
        if prefix + "E" in state_dict:  # the Parameters by their names, not a state dict
            weight = state_dict[prefix + "E"][:, None] * weight
        if self.start is not None:
            weight, self.loaded_origin = as_read(weight, dim=0)
            if self.loaded_origin is None:
                error_msgs.append(f"{prefix}weight: {ANOTHER_START}")
                return
        held = as_saved(self.weight.detach(), None, dim=0)
        if weight.shape == held.shape and torch.equal(weight, held.to(weight)):
            return  # what is there already, perhaps at rank 0; keep its split into A and E
        A, E = self.taken_apart(weight)
        self.replace(loaded(self.A, A, local_metadata), loaded(self.E, E, local_metadata))

    def taken_apart(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Split a loaded `weight` into A `(r, in)` and E `(r,)`, whose product it is up to rounding.

        Where E is a Parameter, rows of A keep the length that they have, and E its sign: Eq. (2) holds rows at one
        length, and the optimizer's averages are of factors of this size. So a weight that is put in for an evaluation,
        and the own one again, leave the run as it was. A row of zeros is E = 0, and of A what is there; only what had
        E = 0 before does not get its own A back. At another rank, or where a row has diverged, E is 1.
        """
        live = self.A.detach()
        if not isinstance(self.E, nn.Parameter) or live.is_meta or len(weight) != len(live):
            return weight, self.identity_e(len(weight))
        weight = weight.to(live)
        lengths, found = (torch.linalg.vector_norm(rows.float(), dim=1) for rows in (live, weight))
        E = (torch.where(torch.signbit(self.E.detach()), -1.0, 1.0) * found / lengths).to(self.E)
        empty = found == 0
        known = lengths.isfinite() & E.isfinite() & ((E != 0) | empty)
        A = torch.where(empty[:, None], live, weight / E[:, None].to(live))
        return torch.where(known[:, None], A, weight), E.where(known, 1.0)


class BFactor(nn.Linear):
    """The `lora_B` slot is an `nn.Linear` `(out, r)` whose rank may change, in memory and on loading."""

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
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            missing_keys.append(prefix + "weight")
            return
        if weight.shape[0] != self.out_features:
            error_msgs.append(f"{prefix}weight has {tuple(weight.shape)}, not (out, r) here")
            return
        if self.start is not None:
            weight, negative = as_read(weight, dim=1)
            if negative is None:
                error_msgs.append(f"{prefix}weight: {ANOTHER_START}")
                return
            self.loaded_origin = -negative
        held = as_saved(self.weight.detach(), None, dim=1)
        if weight.shape != held.shape or not torch.equal(weight, held.to(weight)):
            self.weight = loaded(self.weight, weight, local_metadata)
        if self.bias is not None and prefix + "bias" in state_dict:
            self.bias = loaded(self.bias, state_dict[prefix + "bias"], local_metadata)


def linear(weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Linear:
    """Make an ordinary slot that holds these very Parameters; its rank is 1 or more."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = weight
    if bias is not None:
        made.bias = bias
    return made


def renewed(old: Tensor, value: Tensor) -> Tensor:
    """Make a new Parameter with `value`, trained or not as the old one, with its hooks and whatever else a user hung on
    it; a plain tensor is followed by the value itself."""
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
    """Put the value into the old tensor where it fits, as torch's modules load, for an optimizer holds it;
    else `renewed`, on the old one's device (or the value's, when assigning) and of its dtype."""
    assign = local_metadata.get("assign_to_params_buffers", False) or old.device.type == "meta"
    if not assign and value.shape == old.shape:
        with torch.no_grad():
            return old.copy_(value)
    device = value.device if assign else old.device
    return renewed(old, value.detach().to(device=device, dtype=old.dtype, copy=True))

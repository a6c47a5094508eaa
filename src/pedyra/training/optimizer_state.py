"""The optimizer's state by triples: what its second moments tell of them, and that it follows them through a resize."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pedyra.adapters.attach import AdaptedLayer
from pedyra.adapters.resize import Replacement
from pedyra.core.importance import removal_loss

FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "grad_avg", "state1")
"""Averages of gradients: Adam family and Lion, SGD, centred RMSprop, bitsandbytes."""
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "state2", "exp_inf")
"""Entries of squares: Adam family and RMSprop, Adagrad ("sum"), bitsandbytes ("state2")."""

OTHER_AVERAGES = ("acc_delta", "exp_avg_diff", "neg_pre_grad", "exp_avg_slow", "exp_avg_var", "hessian", "grok_ema")
OTHER_AVERAGES = (*OTHER_AVERAGES, "kahan_comp", "compensation")
"""What begins at zero, and may for a new row: averages of updates (Adadelta), of differences of gradients (Adan), a
slower one (AdEMAMix), of variances (AdaBelief), of curvature (Sophia), of gradients (Grokfast); what rounding took."""


@torch.no_grad()
def removal_losses(layers: Sequence[AdaptedLayer], optimizer: Optimizer) -> dict[str, list[float]]:
    """What pruning each triple costs, `removal_loss` of its E where that is trained, else of its row of A.

    0 where the optimizer has not seen a parameter yet. One transfer to the host.
    """
    losses = []
    for layer in layers:
        weight = layer.a.E[:, None] if layer.a.E.requires_grad else layer.a.A
        state = optimizer.state.get(layer.a.E if layer.a.E.requires_grad else layer.a.A, {})
        moment = state.get("exp_avg_sq", state.get("state2"))
        moment = torch.zeros_like(weight) if moment is None else moment.reshape(weight.shape)
        losses.append(removal_loss(weight.float(), moment.float()))
    values = torch.cat(losses).tolist()
    result, at = {}, 0
    for layer in layers:
        result[layer.name] = values[at : at + layer.rank]
        at += layer.rank
    return result


def adopt(optimizer: Optimizer, sibling: nn.Parameter, newcomer: Tensor, name: str) -> None:
    """Put `newcomer` (a layer's E), if it is trained, into the param group of `sibling` (its B, as LoRA+ does).

    A newcomer that some group holds already stays there: an optimizer built after `attach` has placed it (that of
    LoRA+ beside B, with B's learning rate). `add_param_group` would break schedulers that are already built.

    Raises:
        ValueError: no group holds the sibling.
    """
    holds = [any(parameter is sibling for parameter in group["params"]) for group in optimizer.param_groups]
    if not any(holds):
        raise ValueError(
            f"the optimizer does not hold lora_B of {name}; build it from the parameters of the model with its "
            f"adapter, after get_peft_model"
        )
    if not newcomer.requires_grad:
        return
    if not any(parameter is newcomer for group in optimizer.param_groups for parameter in group["params"]):
        optimizer.param_groups[holds.index(True)]["params"].append(newcomer)


@torch.no_grad()
def move_state(optimizer: Optimizer, replacements: Sequence[Replacement], *, new_moments: str) -> None:
    """Replace the old Parameters by the new ones, in place in their groups, and slice their state with the kept rows.

    New rows start with zero moments. With Adam's old step count their first updates would then be up to 6 lr, so
    `new_moments="seed"` gives their second moments (`exp_avg_sq` and its like, the entries that are never negative
    by construction) the mean of the kept rows, a built-in warm-up. Call `optimizer_checks.check_state` first.
    """
    rekey_state(optimizer, {replacement.old: replacement.new for replacement in replacements})
    for replacement in replacements:
        state = optimizer.state.get(replacement.new, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == replacement.old.shape:
                state[key] = _follow(value, replacement, seed=new_moments == "seed" and key in SECOND_MOMENTS)


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
        tensors = [value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor)]
        if any(tensor.dim() and tensor.shape != parameter.shape for tensor in tensors):
            del optimizer.state[parameter]


def _follow(value: Tensor, replacement: Replacement, *, seed: bool) -> Tensor:
    kept = value.index_select(replacement.dim, replacement.kept)
    if replacement.num_new == 0:
        return kept
    shape = list(kept.shape)
    shape[replacement.dim] = replacement.num_new
    fresh = kept.new_zeros(shape)
    if seed and kept.shape[replacement.dim] > 0:
        fresh = kept.mean(replacement.dim, keepdim=True).expand(shape)
    return torch.cat([kept, fresh], replacement.dim)

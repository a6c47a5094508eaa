"""Parameter groups of methods whose gates are trained apart from A and B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
from transformers.trainer_pt_utils import get_parameter_names


def groups_with_gates(
    model: nn.Module, gates: Sequence[nn.Parameter], weight_decay: float, **gate_options: Any
) -> list[dict[str, Any]]:
    """All that is trained: Trainer's two groups, no weight decay for biases and norms, then the gates without any.

    Args:
        gate_options: of the gates' group, e.g. lr.
    """
    held = {id(gate) for gate in gates}
    others = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in held}
    decays = {name for name in get_parameter_names(model, ALL_LAYERNORM_LAYERS) if "bias" not in name}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in others.items() if (name in decays) == which], "weight_decay": decay}
        for decay, which in ((weight_decay, True), (0.0, False))
    ]
    return [*groups, {"params": list(gates), "weight_decay": 0.0, **gate_options}]

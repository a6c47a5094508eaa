"""LoRA+ (Hayou et al. 2024): B learns `ratio` times faster than A. PEFT's optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.optimizers import create_loraplus_optimizer
from torch.optim import Optimizer

from pedyra.methods.adapter import with_lora
from pedyra.methods.method import Adaptation, Method, Request
from pedyra.methods.settings import require


@dataclass(frozen=True, kw_only=True)
class LoraPlusSettings:
    """Settings of LoRA+."""

    ratio: float = 16.0
    """Learning rate of B over that of A. The authors use 10 to 80 with about half of LoRA's rate; 16 is the paper's."""

    def __post_init__(self) -> None:
        require(self.ratio >= 1, f"method_settings.ratio is {self.ratio}; B learns at least as fast as A, so 1 or more")


def prepare(request: Request, settings: LoraPlusSettings) -> Adaptation:
    """LoRA, with `training.learning_rate` for A and `ratio` times that for B, and for biases, as PEFT groups them.

    Departs from the authors' code in nothing; it is PEFT's `create_loraplus_optimizer` with `training.weight_decay`.
    """
    model = with_lora(request)

    def make_optimizer(kind: type[Optimizer], arguments: dict[str, Any], weight_decay: float) -> Optimizer:
        arguments = {**arguments, "loraplus_weight_decay": weight_decay}
        return create_loraplus_optimizer(model, kind, loraplus_lr_ratio=settings.ratio, **arguments)

    return Adaptation(model=model, optimizer=make_optimizer)


METHOD = Method(
    "lora+", "LoRA whose B learns faster than its A (Hayou et al. 2024)", prepare, LoraPlusSettings, takes_ranks=True
)

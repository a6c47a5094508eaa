"""LoRA+ (Hayou et al. 2024): LoRA whose B learns faster than its A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import Optimizer

from pedyra.allocate.contract import Method, Training, Work
from pedyra.allocate.schedule import check_number


@dataclass(frozen=True, kw_only=True)
class LoraPlus(Method):
    """LoRA+ (Hayou et al. 2024): LoRA whose B learns faster than its A.

    A has the learning rate of the training, and B and biases have `ratio` times that, as PEFT groups them. Departs from
    the authors' code in nothing: it is PEFT's `create_loraplus_optimizer`, with the weight decay of the training.
    """

    ratio: float = 16.0
    """Learning rate of B over that of A. The authors use 10 to 80 with about half of LoRA's rate; 16 is the paper's."""

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, least=1)

    def install(self, model: nn.Module, adapter: str = "default", training: Training | None = None) -> Work:
        return TwoRates(model, self.ratio)


class TwoRates(Work):
    def __init__(self, model: Any, ratio: float) -> None:
        self.model, self.ratio = model, ratio

    def make_optimizer(self, kind: type[Optimizer], arguments: dict[str, Any], weight_decay: float) -> Optimizer:
        arguments = {**arguments, "loraplus_weight_decay": weight_decay}
        return create_loraplus_optimizer(self.model, kind, loraplus_lr_ratio=self.ratio, **arguments)

"""LoRA, LoRA+, PiSSA, DoRA and QLoRA are a LoraConfig, or an optimizer of PEFT, and are never rewritten."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from pydantic import Field
from torch.optim import Optimizer

from pedyra.errors import UserError
from pedyra.lora.attach import attach, train_e
from pedyra.lora.start import takes_from_weight
from pedyra.methods.method import Adaptation, Method, Request, Settings, is_quantised


def _plain(request: Request, **changes: Any) -> PeftModel:
    """Give the base the LoRA of the run.

    A start that takes from the weight (PiSSA, OLoRA) is attached, with E frozen at 1. It trains exactly as PEFT does,
    and what is saved is an ordinary LoRA against the pristine weight, of rank 2r. PEFT's own folder needs the start
    again when it is loaded, and a random SVD (pissa_niter_4) does not come out twice.
    """
    model = request.with_lora(**changes)
    if takes_from_weight(changes.get("init_lora_weights", request.lora.init_lora_weights)):
        train_e(attach(model), False)
    return model


def lora(request: Request) -> Adaptation:
    """Make LoRA (Hu et al. 2021), as the run asks for it; DoRA (Liu et al. 2024) where it has `use_dora`."""
    return Adaptation(model=_plain(request))


def pissa(request: Request) -> Adaptation:
    """Make PiSSA (Meng et al. 2024): LoRA from the top singular triples of the weight; the frozen weight is the rest.

    The authors set alpha = r; the recipe decides, and W - s B A keeps the function whatever the scaling s.
    """
    init = request.lora.init_lora_weights
    own = isinstance(init, str) and init.startswith("pissa")
    if not own and init is not True:
        raise UserError(f"lora.init is {init!r}, but method pissa is a start of its own; give pissa or pissa_niter_16")
    return Adaptation(model=_plain(request, init_lora_weights=init if own else "pissa"))


def qlora(request: Request) -> Adaptation:
    """Make QLoRA (Dettmers et al. 2023): LoRA over frozen weights in 4 bits (NF4, double quantisation).

    The adapter is LoRA's, and so is its number of parameters; packed weights halve the denominator of a percentage. The
    authors' paged AdamW is `training.optim: paged_adamw_32bit`. Raises ValueError: the base model is not quantised.
    """
    if not is_quantised(request.model):
        raise UserError("method qlora needs a quantised model; set model.quantization to nf4 or int8")
    return Adaptation(model=_plain(request))


class LoraPlusSettings(Settings):
    """Settings of LoRA+."""

    ratio: float = Field(16.0, ge=1)
    """Learning rate of B over that of A. The authors use 10 to 80 with about half of LoRA's rate; 16 is the paper's."""


def loraplus(request: Request, settings: LoraPlusSettings) -> Adaptation:
    """Make LoRA, with `training.learning_rate` for A and `ratio` times that for B, and for biases, as PEFT groups them.

    Departs from the authors' code in nothing; it is PEFT's `create_loraplus_optimizer` with `training.weight_decay`.
    """
    model = _plain(request)

    def make_optimizer(kind: type[Optimizer], arguments: dict[str, Any], weight_decay: float) -> Optimizer:
        arguments = {**arguments, "loraplus_weight_decay": weight_decay}
        return create_loraplus_optimizer(model, kind, loraplus_lr_ratio=settings.ratio, **arguments)

    return Adaptation(model=model, optimizer=make_optimizer)


LORA = Method("lora", "LoRA (Hu et al. 2021)", lora)
LORA_PLUS = Method("lora+", "LoRA whose B learns faster than its A (Hayou et al. 2024)", loraplus, LoraPlusSettings)
PISSA = Method("pissa", "LoRA from the weight's top triples (Meng et al. 2024)", pissa)
DORA = Method("dora", "LoRA of a direction, and its magnitude (Liu et al. 2024)", lora, lora={"use_dora": True})
QLORA = Method("qlora", "LoRA over weights in 4 bits (Dettmers et al. 2023)", qlora, quantization="nf4")

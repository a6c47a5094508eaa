"""Methods that are a LoraConfig and nothing else: PEFT's own, never rewritten."""

from __future__ import annotations

from pedyra.lora.attach import attach, train_e
from pedyra.methods.adapter import is_quantised, with_lora
from pedyra.methods.method import Adaptation, Method, Request


def lora(request: Request) -> Adaptation:
    """LoRA (Hu et al. 2021), as the run asks for it; DoRA (Liu et al. 2024) where it has `use_dora`."""
    return Adaptation(model=with_lora(request))


def pissa(request: Request) -> Adaptation:
    """PiSSA (Meng et al. 2024): LoRA from the top singular triples of the weight; the frozen weight is the rest.

    The triples are attached with E frozen at 1, which trains exactly as PEFT does, for what attaching adds on disk:
    an ordinary LoRA against the pristine weight (of rank 2r), where PEFT's own folder needs the SVD again. The
    authors set alpha = r; the recipe decides, and W - s B A keeps the function whatever the scaling s.
    """
    init = request.lora.init_lora_weights
    own = isinstance(init, str) and init.startswith("pissa")
    if not own and init is not True:
        raise ValueError(f"lora.init is {init!r}, but method pissa is a start of its own; give pissa or pissa_niter_16")
    model = with_lora(request, init_lora_weights=init if own else "pissa")
    train_e(attach(model), False)
    return Adaptation(model=model)


def qlora(request: Request) -> Adaptation:
    """QLoRA (Dettmers et al. 2023): LoRA over frozen weights in 4 bits (NF4, double quantisation).

    The adapter is LoRA's, and so is its number of parameters; packed weights halve the denominator of a percentage.
    The authors' paged AdamW is `training.optim: paged_adamw_32bit`; methods that move ranks refuse it.

    Raises:
        ValueError: the base model is not quantised.
    """
    if not is_quantised(request.model):
        raise ValueError("method qlora needs a quantised model; set model.quantization to nf4 or int8")
    return Adaptation(model=with_lora(request))


LORA = Method("lora", "LoRA (Hu et al. 2021)", lora, takes_ranks=True)
PISSA = Method("pissa", "LoRA from the weight's top triples (Meng et al. 2024)", pissa, takes_ranks=True)
DORA = Method(
    "dora", "LoRA of a direction, and its magnitude (Liu et al. 2024)", lora, takes_ranks=True, lora={"use_dora": True}
)
QLORA = Method(
    "qlora", "LoRA over weights in 4 bits (Dettmers et al. 2023)", qlora, takes_ranks=True, quantization="nf4"
)

"""PE-DyRA in a recipe: the paper's scores and plan, on top of LoRA, DoRA, PiSSA or QLoRA."""

from __future__ import annotations

from pedyra.methods.adapter import adaptive, with_lora
from pedyra.methods.method import Adaptation, Method, Request
from pedyra.pe_dyra.method import PeDyra


def prepare(request: Request) -> Adaptation:
    """Prune and expand at a conserved budget of layers x lora.r ranks; `request.rank` has fields of `PeDyra`.

    It goes on top of DoRA, PiSSA (`lora.use_dora`, `lora.init`) and QLoRA (`model.quantization`), Tables 11 and 12.
    """
    return adaptive(with_lora(request), PeDyra(**{"seed": request.seed, **request.rank}).method())


METHOD = Method("pedyra", "PE-DyRA, the paper: triples move between layers", prepare, moves_ranks=True)

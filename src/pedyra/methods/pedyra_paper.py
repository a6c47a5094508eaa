"""PE-DyRA as the paper has it: its scores, Algorithm 1, and its plan, Algorithm 2."""

from __future__ import annotations

from pedyra.config import RankConfig, without_fit
from pedyra.methods import from_config
from pedyra.methods.adapter import adaptive, with_lora
from pedyra.methods.method import Adaptation, Request


def prepare(request: Request) -> Adaptation:
    """Prune and expand at a conserved budget of layers x lora.r ranks; `request.rank` is on top of `RankConfig.paper`.

    It goes on top of DoRA, PiSSA (`lora.use_dora`, `lora.init`) and QLoRA (`model.quantization`), Tables 11 and 12.
    """
    config = RankConfig.paper(**{"seed": request.seed, **without_fit(request.rank)})
    return adaptive(with_lora(request), config, from_config(config))

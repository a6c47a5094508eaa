"""PE-DyRA, with our defaults and as the paper has it."""

from __future__ import annotations

from pedyra.config import RankConfig
from pedyra.methods import from_config
from pedyra.methods.adapter import adaptive, with_lora
from pedyra.methods.method import Adaptation, Request
from pedyra.methods.pedyra.run import Pedyra
from pedyra.methods.pedyra.settings import Settings


def prepare(request: Request, settings: Settings) -> Adaptation:
    """PE-DyRA: prune and expand at a conserved budget of layers x lora.r ranks, or of their parameters.

    `request.rank` has all that users choose. It goes on top of DoRA, PiSSA (`lora.use_dora`, `lora.init`) and QLoRA
    (`model.quantization`), Tables 11 and 12.
    """
    config = RankConfig.from_dict({"seed": request.seed, **request.rank})
    if config.budget == "fit" and settings != Settings():
        raise ValueError("method_settings are of moving ranks, and rank.budget 'fit' moves none; leave them out")
    method = from_config(config) if config.budget == "fit" else Pedyra(settings)
    return adaptive(with_lora(request), config, method)


def prepare_paper(request: Request) -> Adaptation:
    """The same by the paper's scores and Algorithm 2; `request.rank` is on top of `RankConfig.paper`."""
    config = RankConfig.paper(**{"seed": request.seed, **request.rank})
    return adaptive(with_lora(request), config, from_config(config))

"""PARA (2026): train a LoRA of higher rank, then cut all layers at one threshold on their singular values."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel

from pedyra.allocate.allocation import lowest_to_free
from pedyra.lora.attach import attach, check_supported, detach, write_ranks
from pedyra.lora.layer import AdaptedLayer, lora_layers, rank_parameters
from pedyra.lora.resize import install, resized
from pedyra.methods.method import Adaptation, Method, Request

FACTOR = 4
"""The LoRA that is trained has rank 4 lora.r; factors of 4 to 10 are the authors' 75 to 90 % fewer parameters."""


def truncate(model: PeftModel, rank: int) -> dict[str, int]:
    """Keep the largest singular triples of the updates of all layers, to the parameters of a uniform `rank`; in place.

    One threshold for all layers, on the singular values of s B A. A layer may lose all. Nothing is merged, so a
    quantised base is as good as any. A run that diverged has no singular values: all its layers are cut to `rank`.
    Returns the ranks.
    """
    diverged = not all(parameter.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)
    # The update's exact singular triples; E holds the values.
    layers = attach(model, start="lora" if diverged else "svd")
    values = {layer.name: _singular_values(layer) for layer in layers}
    sizes = {layer.name: rank_parameters(layer.a.in_features, layer.b.out_features) for layer in layers}
    excess = sum(len(found) * sizes[name] for name, found in values.items()) - rank * sum(sizes.values())
    if diverged:
        pruned = {layer.name: tuple(range(rank, layer.rank)) for layer in layers}
    else:
        pruned = lowest_to_free(values, sizes, excess, min_rank=0)
    changes = ((layer, resized(layer, pruned.get(layer.name, ()), None)) for layer in layers)
    install(changes)
    write_ranks(model)
    detach(model)
    return {name: len(found) - len(pruned.get(name, ())) for name, found in values.items()}


def _singular_values(layer: AdaptedLayer) -> list[float]:
    return (layer.scaling * layer.a.E.detach().abs()).tolist()


def prepare(request: Request) -> Adaptation:
    """LoRA of rank 4 lora.r at the scaling of lora.r, cut after training to the budget of lora.r.

    While it trains it has four times the parameters of the other methods; what is evaluated and saved has theirs.
    Raises ValueError: a start that rewrites the base: cutting its triples would cut pre-trained content.
    """
    request.refuse_lora("the scaling would change with the trained rank", "use_rslora")
    init: Any = request.lora.init_lora_weights
    if isinstance(init, str) and init.startswith(("pissa", "olora")):
        raise ValueError(
            f"lora.init is {init!r}, which moves pre-trained content into the adapter, and PARA would cut it away; "
            f"leave it out"
        )
    model = request.with_lora(r=FACTOR * request.lora.r, lora_alpha=request.lora.lora_alpha * FACTOR)
    check_supported(model.peft_config["default"], list(lora_layers(model, "default")))  # not after the training

    @torch.no_grad()
    def finish() -> None:
        truncate(model, request.lora.r)

    return Adaptation(model=model, finish=finish)


METHOD = Method("para", "LoRA of higher rank, cut after training at one threshold (2026)", prepare)

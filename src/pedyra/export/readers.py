"""An adapter is written for other readers: the same update under PEFT's, vLLM's and llama.cpp's scaling.

The three readers disagree on the scaling of a layer whose rank is not the rank `r` of the whole adapter: PEFT takes
alpha_i / r_i from its patterns, vLLM alpha / r for every layer, llama.cpp alpha / r_i (docs/serve.md).
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from pedyra.errors import UserError
from pedyra.export.destinations import destination
from pedyra.lora.files import refuse_occupied, write_file, write_folder
from pedyra.lora.folder import SavedLora, active_adapter, copy_processing, save_lora, saved_lora
from pedyra.lora.layer import adapted_layers
from pedyra.lora.layer_names import rank_fields
from pedyra.lora.spelling import did_you_mean
from pedyra.lora.start import takes_from_weight

logger = logging.getLogger(__name__)

TARGETS = ("peft", "padded", "gguf", "merged")
RECORD = "pedyra_export.json"
"""This file beside the exported ones has target, ranks, scaling, which layers were folded, and what vLLM needs."""


def export_lora(source: PeftModel | str | Path, target: str, out: Path) -> Path:
    """Write the adapter of a live model or a folder for the readers of `target`, which is not "merged"."""
    if isinstance(source, PeftModel):
        check_base_unchanged(source)
    with saved_lora(source) as lora:
        check_convertible(lora, target)
        tensors, config, record = _converted(lora, target)

        def save(folder: Path) -> None:
            save_lora(folder, tensors, config)
            copy_processing(lora.folder, folder)

        return write_export(out, record, save)


def check_arguments(target: str, out: Path, base: object, overwrite: bool = False) -> None:
    """Refuse an unknown target, a base where none is needed, and an `out` that holds anything but, with `overwrite`, an
    earlier export; ValueError."""
    if target not in TARGETS:
        raise UserError(f"export target {target!r} is unknown; {did_you_mean(target, TARGETS)}")
    if base is not None and target != "merged":
        raise UserError(f"base is given, but target {target} needs no base model; leave it out")
    refuse_occupied(out, [RECORD], "export", overwrite)


def check_base_unchanged(model: PeftModel) -> None:
    """Refuse an active adapter that stands on weights which another one has changed, and its readers have not;
    ValueError."""
    name = active_adapter(model)
    for other, config in model.peft_config.items():
        starts = [layer.a.start for layer in adapted_layers(model, other)]
        if other != name and (takes_from_weight(getattr(config, "init_lora_weights", True)) or any(starts)):
            raise UserError(
                f"adapter {other!r} began as a part of the weights (PiSSA), which are others under {name!r} now than "
                f"its readers have; call model.merge_and_unload(), or load {name!r} into a model without {other!r}"
            )


def check_convertible(lora: SavedLora, target: str) -> None:
    """Refuse an adapter that the readers of `target` do not take, or that adds nothing; ValueError."""
    lora.check_supported(target)
    if not any(layer.scaling for layer in lora.layers):
        raise UserError(f"{lora.title} has a scaling (lora_alpha / r) of 0, so that it adds nothing; set lora_alpha")


def _converted(lora: SavedLora, target: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Make tensors, config and record for the readers of `target`, with the one scaling s of most layers.

    peft: r = max, lora_alpha = s max, alpha_pattern = s r_i, so that alpha_i / r_i and alpha / r are both s. padded:
    zero rows and columns up to the largest rank, so that alpha, r and r_i are the same in every layer. gguf: one alpha,
    and s r_i / alpha folded into B, since llama.cpp divides alpha by the rank of each tensor.
    """
    rank, scaling = max(layer.rank for layer in lora.layers), _common_scaling(lora)
    factors = {layer.name: layer.scaling / scaling for layer in lora.layers}
    if target == "gguf":
        factors = {layer.name: layer.scaling * layer.rank / (scaling * rank) for layer in lora.layers}
    tensors = _folded(lora, factors)
    for layer in lora.layers if target == "padded" else ():
        A, B = (tensors[layer.keys[slot]] for slot in "AB")
        missing = rank - layer.rank
        # F.pad counts from the last dimension; a convolution's factors have kernel dimensions after the rank's.
        tensors[layer.keys["A"]] = F.pad(A, (0, 0) * (A.dim() - 1) + (0, missing))
        tensors[layer.keys["B"]] = F.pad(B, (0, 0) * (B.dim() - 2) + (0, missing))
    patterns = {"peft": ("rank_pattern", "alpha_pattern"), "padded": (), "gguf": ("rank_pattern",)}[target]
    return tensors, _config(lora, scaling, patterns), _record(lora, target, scaling, factors)


def _common_scaling(lora: SavedLora) -> float:
    """Find the scaling other than 0 that most layers have, by 12 digits: s r / r need not be s to the last bit."""
    scalings = (float(f"{layer.scaling:.12g}") for layer in lora.layers)
    return Counter(scaling for scaling in scalings if scaling).most_common(1)[0][0]


def _folded(lora: SavedLora, factors: dict[str, float]) -> dict[str, Tensor]:
    """Multiply B (and its bias) of each layer by its factor, in its own dtype; all other tensors stay."""
    tensors = dict(lora.tensors)
    for layer in lora.layers:
        if _is_folded(factors[layer.name]):
            for key in (layer.keys[slot] for slot in ("B", "bias") if slot in layer.keys):
                tensors[key] = tensors[key] * factors[layer.name]
    return tensors


def _is_folded(factor: float) -> bool:
    return not math.isclose(factor, 1, rel_tol=1e-9)


def _config(lora: SavedLora, scaling: float, patterns: tuple[str, ...]) -> dict[str, Any]:
    fields = rank_fields({layer.name: (layer.rank, scaling) for layer in lora.layers})
    unread = {name: {} for name in ("rank_pattern", "alpha_pattern") if name not in patterns}
    config = {**lora.config, **fields, **unread, "inference_mode": True}
    if "eva_config" in config:
        config["eva_config"] = None
    return config


def _record(lora: SavedLora, target: str, scaling: float, factors: dict[str, float]) -> dict[str, Any]:
    folded = {name: factor for name, factor in factors.items() if _is_folded(factor)}
    if folded and target != "gguf":
        logger.warning(
            "%d of %d layers have another scaling than %g; the ratio was multiplied into their B (%s)",
            *(len(folded), len(lora.layers), scaling, RECORD),
        )
    ranks = {layer.name: layer.rank for layer in lora.layers}
    largest = max(ranks.values())
    vllm = destination("vllm")
    reads = {"max_lora_rank": vllm.rank_for(largest), "refused_for": vllm.refused_for(lora)}
    return {
        "target": target,
        "scaling": scaling,
        "max_rank": largest,
        "ranks": ranks,
        "folded_into_B": folded,
        # It takes one scaling for all layers, which the gguf folder does not have.
        "vllm": None if target == "gguf" else reads,
    }


def write_export(out: Path, record: dict[str, Any], save: Any) -> Path:
    """Have `save` fill a folder, add the record, and put it in the place of `out`, whole or not at all."""

    def fill(part: Path) -> None:
        save(part)
        text = json.dumps({"pedyra_version": version("pedyra"), **record}, indent=2)
        write_file(part / RECORD, text + "\n")

    write_folder(out, fill)
    return out

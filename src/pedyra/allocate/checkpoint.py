"""The side file of a checkpoint: what an ordinary LoRA folder cannot hold and an exact resume needs.

`pedyra_state.safetensors` has the raw A, E, B and the score state, `pedyra_state.json` the step, history and
config; SHA256SUMS, written last, has their digests and those of the adapter beside them, so that files that do not
belong together are recognised.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from torch.optim import Optimizer

from pedyra.allocate.optimizer_state import rekey_state
from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.errors import UserError
from pedyra.lora.attach import write_ranks
from pedyra.lora.factors import successor
from pedyra.lora.files import check_sums, read_json, read_sums, write_file, write_sums
from pedyra.lora.folder import ADAPTER_FILES, read_tensors
from pedyra.lora.layer import adapted_layers
from pedyra.lora.replacement import put_factors
from pedyra.lora.start import set_origin

logger = logging.getLogger(__name__)

TENSORS, STATE_RECORD = "pedyra_state.safetensors", "pedyra_state.json"
FORMAT = 13


class SideFileError(UserError):
    """A side file is missing, damaged, or belongs to another run; the message says which and what."""


def save_state(allocator: RankAllocator, folder: Path | str) -> None:
    """Write both side files of `allocator`, and then SHA256SUMS, into `folder`, or into its adapter's own there."""
    folder = _own_folder(folder, allocator.adapter_name)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"scores.{name}": value for name, value in allocator.run.tensors().items()}
    layers = adapted_layers(allocator.model, allocator.adapter_name)  # frozen ones, too
    for layer in layers:
        tensors |= {f"{kind}.{layer.name}": factor.detach() for kind, factor in zip("AEB", layer.factors, strict=True)}
        if layer.a.origin is not None and layer.b.origin is not None:
            tensors[f"origin_A.{layer.name}"], tensors[f"origin_B.{layer.name}"] = layer.a.origin, layer.b.origin
    record = {
        "format": FORMAT,
        "step": allocator.step,
        "total_steps": allocator.schedule.total_steps,
        "adapter": allocator.adapter_name,
        "initial_ranks": allocator.initial_ranks,
        "initial_parameters": allocator.initial_parameters,
        "config": allocator.method.to_dict(),
        "scaling": {layer.name: layer.scaling for layer in layers},
        "doubling": {layer.name: layer.a.doubling for layer in layers},
        "history": allocator.history,
        "method": allocator.run.values(),
    }
    write_file(folder / TENSORS, save({name: value.contiguous().cpu() for name, value in tensors.items()}))
    write_file(folder / STATE_RECORD, json.dumps(record))
    write_sums(folder, [TENSORS, STATE_RECORD, *(name for name in ADAPTER_FILES if (folder / name).is_file())])


def restore(allocator: RankAllocator, folder: Path | str) -> None:
    """Bring a fresh `allocator`, its layers and its optimizer to the state saved in `folder`, bit for bit.

    The optimizer's own state must already be loaded: it is kept and re-keyed to the new Parameters. Nothing is
    changed when the files cannot be used.

    Raises:
        SideFileError: a file is missing, damaged or another run's; the message names it.
    """
    folder = _own_folder(folder, allocator.adapter_name)
    record, tensors = read_state(folder)
    if record["adapter"] != allocator.adapter_name:
        raise SideFileError(
            f"{folder / STATE_RECORD} is of adapter {record['adapter']!r}, not {allocator.adapter_name!r}"
        )
    old, new = record["config"], allocator.method.to_dict()
    if old != new:
        changed = ", ".join(f"{key} {old.get(key)!r} -> {new[key]!r}" for key in new if old.get(key) != new[key])
        raise SideFileError(
            f"{folder / STATE_RECORD} was written with other rank settings ({changed}); resume with the same"
        )
    before, now = record["total_steps"], allocator.schedule
    if before != now.total_steps:
        left = [step for step in now.adjustments if step > record["step"]]
        when = f"the next adjustment follows step {left[0]}" if left else "no adjustment is left"
        warnings.warn(
            f"the run has {now.total_steps} steps, and had {before} when {folder} was saved: ranks move by the "
            f"schedule of {now.total_steps} steps from here, in which {when}",
            stacklevel=2,
        )
    _restore_factors(allocator.model, allocator.adapter_name, record, tensors, folder, allocator.optimizer)
    scores = {name: value for name, value in tensors.items() if name.startswith("scores.")}
    allocator.load_state(record, {name.removeprefix("scores."): value for name, value in scores.items()})


def restore_factors(model: nn.Module, folder: Path, adapter_name: str = "default") -> None:
    """Restore only A, E, B of every layer, for inference (`load_best_model_at_end`). Raises SideFileError."""
    folder = _own_folder(folder, adapter_name)
    _restore_factors(model, adapter_name, *read_state(folder), folder)


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read the record and the tensors of a side file, checked against each other and the adapter by their digests.
    Raises SideFileError: missing, unreadable, of another format, or the pair does not belong together."""
    try:
        check_sums(folder, [STATE_RECORD, TENSORS, *(name for name in ADAPTER_FILES if name in read_sums(folder))])
        record = read_json(folder / STATE_RECORD, {"format": int})
        if record["format"] != FORMAT:
            raise UserError(f"{folder / STATE_RECORD} has format {record['format']}; this pedyra reads {FORMAT}")
        return record, read_tensors(folder / TENSORS)
    except ValueError as error:
        raise SideFileError(str(error)) from None


def _own_folder(folder: Path | str, adapter_name: str) -> Path:
    """Say where PEFT saves an adapter: in the folder itself, or under its name if it is not the default one."""
    return Path(folder) if adapter_name == "default" else Path(folder) / adapter_name


def _restore_factors(
    model: nn.Module,
    adapter_name: str,
    record: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    folder: Path,
    optimizer: Optimizer | None = None,
) -> None:
    layers = adapted_layers(model, adapter_name)
    saved = {name[2:] for name in tensors if name.startswith("A.")}
    if odd := sorted(saved ^ {layer.name for layer in layers}):
        raise SideFileError(f"{folder / TENSORS} is of another model: layer {odd[0]!r} is not in both")
    for layer in layers:
        if (layer.a.start is None) == (f"origin_A.{layer.name}" in tensors):
            raise SideFileError(
                f"{folder / TENSORS} is of another start: one of the two began as a part of the weights (PiSSA, "
                f"OLoRA); make the model by get_peft_model with the same LoraConfig, not from the saved adapter"
            )
    if odd := next((layer for layer in layers if tensors[f"A.{layer.name}"].dtype != layer.a.weight.dtype), None):
        logger.warning(
            "the saved factors are in %s, and PEFT has loaded them in %s, in which the run goes on",
            tensors[f"A.{odd.name}"].dtype, odd.a.weight.dtype,
        )  # fmt: skip
    for layer in layers:
        olds = layer.factors
        pairs = [(old, tensors[f"{kind}.{layer.name}"]) for kind, old in zip("AEB", olds, strict=True)]
        news = [successor(old, value.to(old.device, old.dtype, copy=True)) for old, value in pairs]
        put_factors([(layer, news)])
        layer.rescale(record["scaling"][layer.name])
        doubling = record["doubling"][layer.name]
        layer.a.doubling = None if doubling is None else tuple(doubling)
        if layer.a.start is not None:
            set_origin(layer, *(tensors[f"origin_{kind}.{layer.name}"] for kind in "AB"))
        if optimizer is not None:
            rekey_state(optimizer, dict(zip(olds, news, strict=True)))
    write_ranks(model, adapter_name)

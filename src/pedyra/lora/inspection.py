"""The files of a LoRA adapter say what it holds, without a model: ranks, parameters, effective ranks, bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pedyra.errors import UserError
from pedyra.lora.files import SUMS, check_sums, read_json, read_sums
from pedyra.lora.spectrum import effective_rank, singular_values

PREFIX = "base_model.model."
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_SLOTS = {
    "A": "A",
    "B": "B",
    "E": "E",  # of PEFT's AdaLoRA
    "A.weight": "A",
    "B.weight": "B",
    "B.bias": "bias",
    "embedding_A": "A",
    "embedding_B": "B",
    "magnitude_vector": "magnitude",
    "magnitude_vector.weight": "magnitude",
}


def inspect_adapter(path: Path) -> list[dict[str, Any]]:
    """Make a row for each layer of a run folder's adapter, or of any PEFT LoRA folder (a checkpoint is one too). They
    go by name, block 2 before block 10; then comes the row `total`.

    A layer of rank 0 is one triple of zeros on disk, and counts as what it is. The effective rank (`lora.spectrum`) is
    that of the update B A. It is None of the experts of a MoE block, which have an update each, and so is their rank
    where the config has several that it may be. `total` also has the number of parameters that are saved beside the
    factors (a classification head, biases), and the bytes of all tensors.

    Raises:
        ValueError: no adapter is there, it is no LoRA, or its file is damaged.
    """
    folder = find_adapter(path)
    config = read_adapter_config(folder)
    if config["peft_type"] not in ("LORA", "ADALORA"):
        raise UserError(f"{folder} holds an adapter of type {config['peft_type']}; only LoRA adapters can be inspected")
    tensors = read_tensors(folder / "adapter_model.safetensors")
    layers = {name: keys for name, keys in keys_by_layer(tensors).items() if {"A", "B"} <= keys.keys()}
    if not layers:
        raise UserError(f"{folder / 'adapter_model.safetensors'} holds no LoRA factors")
    factors = {name: {slot: tensors[key] for slot, key in keys.items()} for name, keys in layers.items()}
    rows = [_row(name, factors[name], _ranks_of_experts(config, name)) for name in sorted(factors, key=_natural)]
    columns = {key: [row[key] for row in rows] for key in ("rank", "parameters", "effective_rank")}
    total = {
        "layer": "total",
        **{key: None if None in values else sum(values) for key, values in columns.items()},
        "other_parameters": sum(t.numel() for t in tensors.values())
        - sum(t.numel() for parts in factors.values() for t in parts.values()),
        "bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
    }
    return [*rows, total]


def keys_by_layer(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Sort the keys: layer name in the base model -> slot (A, B, E, bias, magnitude) -> key of its tensor."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        name, separator, slot = key.removeprefix(PREFIX).rpartition(".lora_")
        if separator and slot in _SLOTS:
            found.setdefault(name, {})[_SLOTS[slot]] = key
    return found


def find_adapter(path: Path) -> Path:
    """Find the adapter folder of a run, or take the folder itself if it is one.

    Raises:
        ValueError: neither, and for an unfinished run it names the checkpoint to use instead; or a file of it is not
            the one that pedyra wrote.
    """
    if not path.is_dir():
        found = "is a file" if path.is_file() else "does not exist"
        raise UserError(f"{path} {found}; give a run folder or an adapter folder")
    for folder in (path / "adapter", path):
        if (folder / "adapter_config.json").is_file():
            if not (folder / "adapter_model.safetensors").is_file():
                raise UserError(f"{folder} has no adapter_model.safetensors; save the adapter in that format")
            _check_whole(folder)
            return folder
    checkpoints = sorted(path.glob("checkpoint-*"), key=lambda found: found.stat().st_mtime)
    hint = f"; its run is unfinished, try {checkpoints[-1]}" if checkpoints else ""
    raise UserError(f"{path} holds no adapter (adapter_config.json){hint}")


def _check_whole(folder: Path) -> None:
    """Raise ValueError where a file of the adapter is not the one that was written. A folder without sums, as PEFT
    writes it, is taken as it is."""
    if not (folder / SUMS).is_file():
        return
    try:
        check_sums(folder, [name for name in ADAPTER_FILES if name in read_sums(folder)])
    except ValueError as error:
        raise UserError(f"{error}; if you changed it yourself, remove {folder / SUMS}") from None


_CONFIG = {
    "peft_type": str,
    "base_model_name_or_path": (str, None),
    "revision": (str, None),
    "task_type": (str, None),
    "target_modules": (str, [str], None),
    "exclude_modules": (str, [str], None),
    "rank_pattern": (dict, None),
    "alpha_pattern": (dict, None),
    "target_parameters": ([str], None),
    "modules_to_save": ([str], None),
    "layers_pattern": (str, [str], None),
    "auto_mapping": ({"base_model_class": (str, None)}, None),
    "megatron_config": None,  # PEFT would import the module that megatron_core names
}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`. Raises ValueError, which names the field, where that is damaged."""
    return read_json(folder / "adapter_config.json", _CONFIG)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file. Raises ValueError, with the file's name, if it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Make a sort key under which layer.2 comes before layer.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _ranks_of_experts(config: Mapping[str, Any], name: str) -> set[Any]:
    """Return the ranks that the config may give a layer, of which the file does not say which parameter of the experts
    (`target_parameters`) it holds; none where no such parameters are adapted."""
    ranks, layer = config.get("rank_pattern") or {}, name.replace(".base_layer", "")
    names = [f"{layer}.{each.rpartition('.')[2]}" for each in config.get("target_parameters") or ()]
    return {ranks.get(get_pattern_key(list(ranks), each), config.get("r")) for each in names}


def _row(name: str, parts: Mapping[str, Tensor], of_experts: set[Any]) -> dict[str, Any]:
    # Factors of a convolution have kernel dimensions; its update is the same product with those flattened.
    A, B = parts["A"].flatten(1), parts["B"].flatten(1)
    E = parts["E"].flatten() if "E" in parts else torch.ones(len(A))
    empty = len(A) == 1 and not A.any() and not B.any()
    stacked = bool(of_experts) and len(A) not in of_experts  # the factors of all experts, one after the other
    rank = len(A) if not stacked else min(of_experts) if len(of_experts) == 1 else None
    return {
        "layer": name,
        "rank": 0 if empty else rank,
        "parameters": sum(part.numel() for slot, part in parts.items() if not (empty and slot in ("A", "E", "B"))),
        "effective_rank": None if stacked else effective_rank(singular_values(A, E, B)),
    }

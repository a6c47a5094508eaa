"""What a saved LoRA adapter holds: ranks, parameters, effective ranks, bytes; read from its files, without a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pedyra.lora.files import read_json
from pedyra.lora.spectrum import effective_rank, singular_values


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """One adapted layer, and the effective rank (`lora.spectrum`) of its update B A.

    A layer of rank 0 is one triple of zeros on disk, and counts as what it is.
    """

    layer: str
    rank: int
    parameters: int
    effective_rank: float


@dataclass(frozen=True, kw_only=True)
class AdapterSummary:
    """All layers of one adapter, by name, block 2 before block 10."""

    layers: list[LayerSummary]
    other_parameters: int
    """Parameters saved beside the LoRA factors: a classification head, biases."""
    bytes: int
    """Of all tensors together."""

    def rows(self) -> list[dict[str, Any]]:
        """One row per layer, then `total`."""
        rows: list[dict[str, Any]] = [vars(layer) for layer in self.layers]
        total = {
            "layer": "total",
            **{key: sum(row[key] for row in rows) for key in ("rank", "parameters", "effective_rank")},
            "other_parameters": self.other_parameters,
            "bytes": self.bytes,
        }
        return [*rows, total]


def inspect_adapter(path: Path) -> AdapterSummary:
    """Summary of a run folder's adapter, or of any PEFT LoRA folder (a checkpoint is one too).

    Raises:
        ValueError: no adapter is there, it is no LoRA, or its file is damaged.
    """
    folder = find_adapter(path)
    kind = read_adapter_config(folder)["peft_type"]
    if kind not in ("LORA", "ADALORA"):
        raise ValueError(f"{folder} holds an adapter of type {kind}; only LoRA adapters can be inspected")
    tensors = read_tensors(folder / "adapter_model.safetensors")
    factors = _by_layer(tensors)
    layers = [_summarise(name, factors[name]) for name in sorted(factors, key=_natural)]
    in_layers = sum(tensor.numel() for parts in factors.values() for tensor in parts.values())
    if not layers:
        raise ValueError(f"{folder / 'adapter_model.safetensors'} holds no LoRA factors")
    return AdapterSummary(
        layers=layers,
        other_parameters=sum(t.numel() for t in tensors.values()) - in_layers,
        bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
    )


def find_adapter(path: Path) -> Path:
    """The adapter folder of a run, or the folder itself if it is one.

    Raises:
        ValueError: neither; for an unfinished run it names the checkpoint to use instead.
    """
    if not path.is_dir():
        found = "is a file" if path.is_file() else "does not exist"
        raise ValueError(f"{path} {found}; give a run folder or an adapter folder")
    for folder in (path / "adapter", path):
        if (folder / "adapter_config.json").is_file():
            if not (folder / "adapter_model.safetensors").is_file():
                raise ValueError(f"{folder} has no adapter_model.safetensors; save the adapter in that format")
            return folder
    checkpoints = sorted(path.glob("checkpoint-*"), key=lambda found: found.stat().st_mtime)
    hint = f"; its run is unfinished, try {checkpoints[-1]}" if checkpoints else ""
    raise ValueError(f"{path} holds no adapter (adapter_config.json){hint}")


_CONFIG = {
    "peft_type": str,
    "base_model_name_or_path": (str, None),
    "revision": (str, None),
    "task_type": (str, None),
    "target_modules": (str, [str], None),
    "exclude_modules": (str, [str], None),
    "rank_pattern": (dict, None),
    "alpha_pattern": (dict, None),
    "modules_to_save": ([str], None),
    "layers_pattern": (str, [str], None),
    "auto_mapping": ({"base_model_class": (str, None)}, None),
    "megatron_config": None,  # PEFT would import the module that megatron_core names
}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """What `adapter_config.json` holds. Raises ValueError, which names the field, where that is damaged."""
    return read_json(folder / "adapter_config.json", _CONFIG)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError with the file's name if it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _by_layer(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer name in the base model -> its LoRA tensors by slot: A, B, E, magnitude_vector."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, separator, slot = key.removeprefix("base_model.model.").partition(".lora_")
        if separator:
            layers.setdefault(name, {})[slot.removesuffix(".weight").removeprefix("embedding_")] = tensor
    return {name: parts for name, parts in layers.items() if {"A", "B"} <= parts.keys()}


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key under which layer.2 comes before layer.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _summarise(name: str, parts: dict[str, Tensor]) -> LayerSummary:
    # Factors of a convolution have kernel dimensions; its update is the same product with those flattened.
    A = parts["A"].flatten(1)
    B = parts["B"].flatten(1)
    E = parts["E"].flatten() if "E" in parts else torch.ones(len(A))
    empty = len(A) == 1 and not A.any() and not B.any()
    return LayerSummary(
        layer=name,
        rank=0 if empty else len(A),
        parameters=sum(part.numel() for slot, part in parts.items() if not (empty and slot in ("A", "E", "B"))),
        effective_rank=effective_rank(singular_values(A, E, B)),
    )

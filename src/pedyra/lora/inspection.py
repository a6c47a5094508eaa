"""The files of a LoRA adapter say what it holds, without a model: ranks, parameters, effective ranks, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pedyra.errors import UserError
from pedyra.lora.folder import by_pattern, find_adapter, keys_by_layer, read_adapter_config, read_tensors
from pedyra.lora.singular import effective_rank, singular_values


def inspect_adapter(path: Path) -> list[dict[str, Any]]:
    """List the layers of a run folder's adapter, or of any PEFT LoRA folder (a checkpoint is one too), by name, with
    block 2 before block 10; the last row is `total`.

    A layer of rank 0, which is saved as one triple of zeros, has no parameters. The effective rank is that of the
    update B A. It is None for the experts of a MoE block, which have an update each, and so is their rank where the
    config has a `rank_pattern`. `total` also counts the parameters beside the factors (a head, biases), and the bytes.
    Raises ValueError: no adapter is there, it is no LoRA, or its file is damaged.
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
    rows = [_row(name, factors[name], config) for name in sorted(factors, key=_natural)]
    columns = {key: [row[key] for row in rows] for key in ("rank", "parameters", "effective_rank")}
    total = {
        "layer": "total",
        **{key: None if None in values else sum(values) for key, values in columns.items()},
        "other_parameters": sum(t.numel() for t in tensors.values())
        - sum(t.numel() for parts in factors.values() for t in parts.values()),
        "bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
    }
    return [*rows, total]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Make a sort key under which layer.2 comes before layer.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _row(name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    # Factors of a convolution have kernel dimensions; its update is the same product with those flattened.
    A, B = parts["A"].flatten(1), parts["B"].flatten(1)
    if "E" in parts:
        A = parts["E"].reshape(-1, 1) * A
    empty = len(A) == 1 and not A.any() and not B.any()
    # The factors of all experts are stacked, and the file does not say which parameter of the experts they adapt.
    expected = by_pattern(config.get("rank_pattern"), name, config.get("r"))
    stacked = bool(config.get("target_parameters")) and len(A) != expected
    of_experts = None if config.get("rank_pattern") else config.get("r")
    return {
        "layer": name,
        "rank": 0 if empty else of_experts if stacked else len(A),
        "parameters": sum(part.numel() for slot, part in parts.items() if not (empty and slot in ("A", "E", "B"))),
        "effective_rank": None if stacked else effective_rank(singular_values(A, B)),
    }

"""The smaller adapter on disk: an ordinary PEFT folder, which loads anywhere without pedyra."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from pedyra.fitting.gramians import Calibration
from pedyra.fitting.worth import Balance, balance
from pedyra.lora.files import write_folder
from pedyra.lora.folder import SavedLora, check_plain, read_lora
from pedyra.lora.layer_names import pattern_keys

RECORD = "pedyra_fit.json"
"""Beside the adapter: how it was chosen, and what it costs."""

Factors = dict[str, tuple[Tensor, Tensor]]
"""Layer -> A `(r, in)` and B `(out, r)`; a layer of rank 0 adds nothing."""


def cut_model(
    model: Any,
    calibration: Calibration,
    ranks: Mapping[str, int],
    out: Path,
    record: dict[str, Any],
    factors: Factors | None = None,
) -> Path:
    """Write the live adapter "default" of `model`, cut to these ranks, into the folder `out`; the model stays.

    Args:
        factors: what is written of layers that keep a direction, where it is not what the cut gives: `Fit.factors`.

    Raises:
        ValueError: `out` holds files; an adapter whose files alone do not give its update.
    """
    with TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        lora = read_lora(Path(scratch), title="the adapter")
        bases = {name: layer.basis for name, layer in calibration.layers.items()}
        return cut_folder(lora, bases, ranks, out, record, factors)


def cut_folder(
    lora: SavedLora,
    bases: Mapping[str, Balance],
    ranks: Mapping[str, int],
    out: Path,
    record: dict[str, Any],
    factors: Factors | None = None,
) -> Path:
    """Write the adapter with the first `ranks[name]` directions of each layer's basis, A' = T A and B' = B T^-1.

    A layer that keeps none leaves the adapter, and `target_modules` names those that stay. The scaling of each layer
    is what it was.

    Raises:
        ValueError: `out` holds files, `lora` is no plain LoRA, or no direction is left.
    """
    check_plain(lora)
    check_out(out)
    for layer in lora.layers:
        measured = len(bases[layer.name].values)
        if layer.rank != measured:
            raise ValueError(
                f"{layer.name} has rank {layer.rank} on disk and was measured at rank {measured}, as a model has that "
                f"began as a part of its weight (PiSSA); save it, load the folder, and fit that"
            )
    kept = [layer for layer in lora.layers if ranks[layer.name]]
    if not kept:
        raise ValueError("no direction is left in any layer, and PEFT knows no adapter of none; keep one at least")
    gone = {key for layer in lora.layers if not ranks[layer.name] for key in layer.keys.values()}
    tensors = {key: tensor for key, tensor in lora.tensors.items() if key not in gone}
    for layer in kept:
        keys = [layer.keys[slot] for slot in "AB"]
        A, B = (lora.tensors[key] for key in keys)
        pair = factors[layer.name] if factors else cut(A, B, bases[layer.name], ranks[layer.name])
        tensors |= {key: each.to("cpu", A.dtype) for key, each in zip(keys, pair, strict=True)}
    config = {**lora.config, **_sizes({layer.name: (ranks[layer.name], layer.scaling) for layer in kept})}

    def fill(part: Path) -> None:
        part.mkdir()
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()},
            part / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        for name, content in (("adapter_config.json", config), (RECORD, record)):
            (part / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    out.parent.mkdir(parents=True, exist_ok=True)
    write_folder(out, fill)
    return out


def cut(A: Tensor, B: Tensor, basis: Balance, rank: int) -> tuple[Tensor, Tensor]:
    """The first `rank` balanced directions of A `(r, in)` and B `(out, r)`, in their own dtype."""
    if rank == len(A):
        return A, B  # to the last bit
    T, inverse = basis.T[:rank], basis.inverse[:, :rank]
    return (T @ A.double()).to(A.dtype), (B.double() @ inverse).to(B.dtype)


def singular_basis(A: Tensor, B: Tensor) -> Balance:
    """The basis of B A's singular directions, for an adapter without data: values are the singular values.

    As in `worth.balance` with the Gramians that white inputs and white gradients would give: P = A A^T, Q = B^T B.
    """
    A, B = A.double(), B.double()
    return balance(A @ A.T, B.T @ B)


def check_out(out: Path) -> None:
    """Raise ValueError where `out` holds anything."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already holds files; choose another folder, or remove it")


def _sizes(layers: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """The fields of LoraConfig that say ranks and scalings: layer -> (rank, scaling)."""
    keys = pattern_keys(layers)
    rank = Counter(rank for rank, _ in layers.values()).most_common(1)[0][0]
    scaling = Counter(scaling for _, scaling in layers.values()).most_common(1)[0][0]
    usual = {"r": rank, "lora_alpha": _number(scaling * rank)}
    other = {name: each for name, each in layers.items() if each != (rank, scaling)}
    return {
        **usual,
        "rank_pattern": {keys[name]: each[0] for name, each in other.items()},
        "alpha_pattern": {keys[name]: _number(each[0] * each[1]) for name, each in other.items()},
        "target_modules": list(layers),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _number(value: float) -> int | float:
    return round(value) if abs(value - round(value)) <= 1e-9 * abs(value) else value

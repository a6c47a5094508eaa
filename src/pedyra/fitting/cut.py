"""The smaller adapter: an ordinary PEFT folder, which loads anywhere without pedyra, and the live model made so."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pedyra.errors import UserError
from pedyra.fitting.calibration import evaluating, layer_has_more, lora_layers
from pedyra.fitting.gramians import Calibration
from pedyra.fitting.verdict import Factors
from pedyra.fitting.worth import Balance
from pedyra.lora.attach import detach
from pedyra.lora.factors import BFactor, linear
from pedyra.lora.files import refuse_occupied, without_nan, write_file, write_folder
from pedyra.lora.folder import SavedLora, copy_processing, save_lora
from pedyra.lora.layer import adapted_layers
from pedyra.lora.layer_names import rank_fields, whole_number

RECORD = "pedyra_fit.json"
"""Beside the adapter: how it was chosen, and by how much the loss rises."""
CURVE = "pedyra_fit_curve.jsonl"
"""Beside the adapter: one row a size that was measured."""


def evened(A: Float[Tensor, "r in"], B: Float[Tensor, "out r"]) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """The same B A, with equal root mean squares of each row of A and its column of B, so that one
    learning rate suits both, and half precision holds both: a balanced basis may scale them apart by orders of
    magnitude."""
    scale = (B.square().mean(0) / A.square().mean(1)).pow(0.25)
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
    return A * scale[:, None], B / scale


def cut(
    A: Float[Tensor, "r in"], B: Float[Tensor, "out r"], basis: Balance, mixed: Float[Tensor, "k k"]
) -> tuple[Float[Tensor, "k in"], Float[Tensor, "out k"]]:
    """The first k balanced directions of A and B, mixed, in their own dtype."""
    rank = len(mixed)
    if rank == len(A) and torch.equal(mixed, torch.eye(rank).to(mixed)):
        return A, B  # to the last bit
    rows, columns = evened(basis.T[:rank] @ A.double(), B.double() @ basis.inverse[:, :rank] @ mixed)
    return rows.to(A.dtype), columns.to(B.dtype)


def cut_factors(
    model: nn.Module, calibration: Calibration, ranks: Mapping[str, int], adapter: str = "default"
) -> Factors:
    """Factors of every layer of the live adapter, with its first `ranks[name]` balanced directions, repaired."""
    mixed, found = calibration.mixed(ranks), {}
    for name, module in lora_layers(model, adapter).items():
        A, B = (slot[adapter].weight.detach() for slot in (module.lora_A, module.lora_B))
        pair = cut(A.cpu(), B.cpu(), calibration.layers[name].basis, mixed[name])
        found[name] = (pair[0].to(A.device), pair[1].to(B.device))
    return found


@contextmanager
def replaced(
    model: nn.Module, factors: Mapping[str, Sequence[Tensor]], adapter: str = "default", read: set[str] | None = None
) -> Iterator[None]:
    """While it lasts, each layer adds what these factors give; those of the adapter stay as they are.

    Args:
        read: gets the layers that took them. One that keeps what it computed of its weights earlier does not.
    """
    layers = lora_layers(model, adapter)
    own = {name: (layer.lora_A[adapter], layer.lora_B[adapter]) for name, layer in layers.items()}
    slots = {name: (_Slot(factors[name][0]), _Slot(factors[name][1], own[name][1].bias)) for name in layers}
    try:
        for name, layer in layers.items():
            layer.lora_A[adapter], layer.lora_B[adapter] = slots[name]
        yield
    finally:
        for name, layer in layers.items():
            layer.lora_A[adapter], layer.lora_B[adapter] = own[name]
        if read is not None:
            read.update(name for name, pair in slots.items() if all(slot.was_read for slot in pair))


@contextmanager
def cut_to(
    model: nn.Module, factors: Factors, adapter: str = "default", read: set[str] | None = None
) -> Iterator[None]:
    """While it lasts, the model is in evaluation mode, with these factors in the place of the adapter's; `read` as of
    `replaced`."""
    with evaluating(model), replaced(model, factors, adapter, read):
        yield


class _Slot(BFactor):
    """Factors in the place of the adapter's, which note that they were read."""

    was_read = False

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__(nn.Parameter(weight, requires_grad=False), bias)
        self.was_read = False  # by what made it

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.was_read = True
        return super().__getattr__(name)


def check_read(ranks: Mapping[str, int], whole: Mapping[str, int], read: Collection[str]) -> None:
    """Raise ValueError for a layer that was cut to fewer directions than the whole has, and whose factors nothing read
    on any held-out row: its cost would be reported as nothing."""
    kept = [name for name, rank in ranks.items() if rank < whole[name] and name not in read]
    if kept:
        raise UserError(
            f"{kept[0]} was cut, and nothing read its smaller factors on the held-out rows, so what that costs is "
            f"unknown: it goes on with weights that were computed or captured before, or no held-out token reaches it "
            f"(an expert); load the adapter in plain PEFT with `pedyra fit FOLDER`, or give more rows"
        )


def write_cut(
    lora: SavedLora,
    factors: Factors,
    out: Path,
    record: Mapping[str, Any],
    *,
    beside: Mapping[str, str] | None = None,
    modules: Collection[str] = (),
) -> None:
    """Write the adapter with these factors into the folder `out`.

    A layer without a direction leaves the adapter, but for one that has a magnitude or a bias, which keeps a row of
    zeros; `target_modules` names those that stay. The scaling of each
    layer is what it was.

    Args:
        record: how it was chosen.
        beside: further files, name -> text.
        modules: names in the base model, none of which may be taken for a layer that stays.

    Raises:
        ValueError: `lora` is no plain LoRA, or no direction is left.
    """
    lora.check_supported("fit")
    _check_there(factors, [layer.name for layer in lora.layers])
    factors = _with_rows(factors, [layer.name for layer in lora.layers if not layer.keys.keys() <= {"A", "B"}])
    kept = [layer for layer in lora.layers if len(factors[layer.name][0])]
    if not kept:
        raise UserError("no direction is left in any layer, and PEFT knows no adapter of none; keep one at least")
    gone = {key for layer in lora.layers if layer not in kept for key in layer.keys.values()}
    # PEFT saves the weight of an adapted lm_head too where the vocabulary was resized, as that of a LoRA layer's base.
    plain = {f".{layer.name}.base_layer.": f".{layer.name}." for layer in lora.layers if layer not in kept}
    tensors = {_renamed(key, plain): tensor for key, tensor in lora.tensors.items() if key not in gone}
    for layer in kept:
        for slot, factor in zip("AB", factors[layer.name], strict=True):
            tensors[layer.keys[slot]] = factor.detach().to("cpu", lora.tensors[layer.keys[slot]].dtype)
    sizes = {layer.name: (len(factors[layer.name][0]), layer.scaling) for layer in kept}
    others = {*modules, *(layer.name for layer in lora.layers)}
    config = {**lora.config, **_sizes(sizes, others), "inference_mode": True}

    def fill(part: Path) -> None:
        save_lora(part, tensors, config)
        copy_processing(lora.folder, part)
        write_file(part / RECORD, json.dumps(without_nan(record), indent=2, allow_nan=False) + "\n")
        for name, text in (beside or {}).items():
            write_file(part / name, text)

    out.parent.mkdir(parents=True, exist_ok=True)
    write_folder(out, fill)


def _with_rows(factors: Factors, names: Iterable[str]) -> Factors:
    """With a row of zeros in these layers where they have none: what they have beside their directions, a magnitude
    (DoRA) or a bias, stays in the adapter."""
    empty = {name: factors[name] for name in names if not len(factors[name][0])}
    return {**factors, **{name: (A.new_zeros(1, A.shape[1]), B.new_zeros(len(B), 1)) for name, (A, B) in empty.items()}}


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for part, name in names.items():
        key = key.replace(part, name)
    return key


@torch.no_grad()
def cut_live(model: Any, factors: Factors, adapter: str = "default") -> None:
    """Give the live adapter these factors, in ordinary `nn.Linear` slots, and bring PEFT's config in line.

    All that is trained of it is a new Parameter. A layer without a direction loses the adapter,
    but for one that has a magnitude or a bias, which keeps a row of zeros.
    """
    if adapted_layers(model, adapter):
        detach(model, adapter)
    layers = lora_layers(model, adapter)
    _check_there(factors, layers)
    factors = _with_rows(factors, [name for name, module in layers.items() if layer_has_more(module, adapter)])
    for name, module in layers.items():
        if not len(factors[name][0]):
            # Not PEFT's delete_adapter, which would make another adapter of the layer the active one.
            for kind in (*module.adapter_layer_names, *module.other_param_names):
                if adapter in (held := getattr(module, kind, None) or ()):
                    del held[adapter]  # pyright: ignore[reportIndexIssue]
            continue
        for slots, factor in zip((module.lora_A, module.lora_B), factors[name], strict=True):
            slot = slots[adapter]
            weight = factor.detach().to(slot.weight).contiguous()
            weight = nn.Parameter(weight, requires_grad=slot.weight.requires_grad)
            slots[adapter] = linear(weight, slot.bias).train(slot.training)
        rank, scaling = len(factors[name][0]), module.scaling[adapter]
        module.r[adapter], module.lora_alpha[adapter] = rank, whole_number(scaling * rank)
        module.use_rslora[adapter] = False
    kept = {name: (len(factors[name][0]), layers[name].scaling[adapter]) for name in layers if len(factors[name][0])}
    config = copy.deepcopy(model.peft_config[adapter])
    for key, value in _sizes(kept, module_names(model)).items():
        setattr(config, key, set(value) if key == "target_modules" and isinstance(value, list) else value)
    model.peft_config[adapter] = config


def module_names(model: Any) -> list[str]:
    """Of all modules of the base model of a PEFT model."""
    return [name for name, _ in model.get_base_model().named_modules()]


def _check_there(factors: Factors, layers: Collection[str]) -> None:
    """Raise ValueError where the adapter lacks a layer that has directions here."""
    gone = [name for name, (A, _) in factors.items() if len(A) and name not in layers]
    if gone:
        raise UserError(
            f"the adapter has no layer {gone[0]} any more, of which this fit keeps {len(factors[gone[0]][0])} "
            f"directions: another fit was applied to it; load the adapter anew, and fit it"
        )


def check_out(out: Path, overwrite: bool = False) -> None:
    """Raise ValueError where `out` may not be written: a link, a place without permission, or a folder that holds
    anything but, with `overwrite`, an earlier fit."""
    refuse_occupied(out, [RECORD], "fit", overwrite)


def _sizes(layers: Mapping[str, tuple[int, float]], modules: Collection[str]) -> dict[str, Any]:
    """The fields of LoraConfig that say which layers of these modules have which (rank, scaling)."""
    return {
        **rank_fields(layers),
        "target_modules": _targets(layers, modules),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _targets(layers: Collection[str], modules: Collection[str]) -> list[str] | str:
    """`target_modules` that means these layers alone. A list also means every module whose name ends as one of them
    does, so where there is such a module it is a regular expression, of which PEFT matches the whole name."""
    others = [name for name in modules if name not in layers]
    if any(other.endswith(f".{name}") for name in layers for other in others):
        return "|".join(map(re.escape, layers))
    return list(layers)

"""A size becomes factors; they are put into the live model for a while or for good, or written as a PEFT folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pedyra.errors import UserError
from pedyra.fitting.balance import Balance
from pedyra.fitting.calibration import Calibration, does_something, lora_layers
from pedyra.fitting.modes import evaluating
from pedyra.lora.attach import detach
from pedyra.lora.factors import BFactor, as_saved, linear
from pedyra.lora.files import refuse_occupied, without_nan, write_file, write_folder
from pedyra.lora.folder import SavedLora, copy_processing, save_lora
from pedyra.lora.layer import adapted_layers
from pedyra.lora.layer_names import rank_fields, whole_number

Factors = dict[str, tuple[Tensor, Tensor]]
"""Layer -> A `(r, in)` and B `(out, r)`; a layer of rank 0 adds nothing."""
FIT_RECORD = "pedyra_fit.json"
"""The file beside the adapter that says how it was chosen, and by how much the loss rises."""
CURVE = "pedyra_fit_curve.jsonl"
"""The file beside the adapter that has a row for each size that was measured."""


def cut(
    A: Float[Tensor, "r in"], B: Float[Tensor, "out r"], basis: Balance, mixed: Float[Tensor, "k k"]
) -> tuple[Float[Tensor, "k in"], Float[Tensor, "out k"]]:
    """Return the first k balanced directions of A and B, mixed, in their own dtype.

    Each row of A and its column of B have equal root mean squares, so that one learning rate suits both, and half
    precision holds both: a balanced basis may scale them apart by orders of magnitude.
    """
    rank = len(mixed)
    if rank == len(A) and torch.equal(mixed, torch.eye(rank).to(mixed)):
        return A, B  # to the last bit
    rows, columns = basis.T[:rank] @ A.double(), B.double() @ basis.inverse[:, :rank] @ mixed
    scale = (columns.square().mean(0) / rows.square().mean(1)).pow(0.25)
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
    return (rows * scale[:, None]).to(A.dtype), (columns / scale).to(B.dtype)


def cut_factors(
    model: nn.Module, calibration: Calibration, ranks: Mapping[str, int], adapter: str = "default"
) -> Factors:
    """Make the factors of every layer of the live adapter, with its first `ranks[name]` balanced directions,
    repaired."""
    mixed, result = calibration.mixed(ranks), {}
    for name, module in lora_layers(model, adapter).items():
        A, B = (slot[adapter].weight.detach() for slot in (module.lora_A, module.lora_B))
        pair = cut(A.cpu(), B.cpu(), calibration.layers[name].basis, mixed[name])
        result[name] = (pair[0].to(A.device), pair[1].to(B.device))
    return result


@contextmanager
def cut_to(
    model: nn.Module, factors: Factors, adapter: str = "default", readers: set[str] | None = None
) -> Iterator[None]:
    """While it lasts, the model is in evaluation mode, and each layer has these factors in place of its own.

    Args:
        readers: gets the layers that read them. One that keeps what it computed of its weights earlier does not.
    """
    layers = lora_layers(model, adapter)
    own = {name: (layer.lora_A[adapter], layer.lora_B[adapter]) for name, layer in layers.items()}
    slots = {name: (_Slot(factors[name][0]), _Slot(factors[name][1], own[name][1].bias)) for name in layers}
    with evaluating(model):
        try:
            for name, layer in layers.items():
                layer.lora_A[adapter], layer.lora_B[adapter] = slots[name]
            yield
        finally:
            for name, layer in layers.items():
                layer.lora_A[adapter], layer.lora_B[adapter] = own[name]
            if readers is not None:
                readers.update(name for name, pair in slots.items() if all(slot.was_read for slot in pair))


class _Slot(BFactor):
    """It holds a factor in the place of the adapter's, and notes that it was read."""

    was_read = False

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__(nn.Parameter(weight, requires_grad=False), bias)
        self.was_read = False  # by what made it

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.was_read = True
        return super().__getattr__(name)


def check_read(model: nn.Module, ranks: Mapping[str, int], readers: Collection[str], adapter: str = "default") -> None:
    """Raise ValueError for a layer that does something and was cut to fewer directions than it has, and whose smaller
    factors nothing read on any held-out row: its cost would be reported as nothing."""
    for name, layer in lora_layers(model, adapter).items():
        smaller = ranks[name] < len(layer.lora_A[adapter].weight)
        if smaller and name not in readers and does_something(layer, adapter):
            raise UserError(
                f"{name} was cut, and nothing read its smaller factors on the held-out rows, so what that costs is "
                f"unknown: it goes on with weights that were computed or captured before, or no held-out token "
                f"reaches it (an expert); load the adapter in plain PEFT with `pedyra fit FOLDER`, or give more rows"
            )


def on_disk(factors: Factors) -> Factors:
    """Give each layer without a direction a row of zeros, since PEFT knows no rank 0."""
    return {name: (as_saved(A, None, 0), as_saved(B, None, 1)) for name, (A, B) in factors.items()}


def write_cut(
    lora: SavedLora, factors: Factors, out: Path, record: Mapping[str, Any], beside: Mapping[str, str] | None = None
) -> None:
    """Write the adapter with these factors into the folder `out`. The scaling of each layer is what it was.

    Args:
        record: how it was chosen.
        beside: further files, name -> text.
    """
    factors, tensors = on_disk(factors), dict(lora.tensors)
    for layer in lora.layers:
        for slot, factor in zip("AB", factors[layer.name], strict=True):
            tensors[layer.keys[slot]] = factor.detach().to("cpu", lora.tensors[layer.keys[slot]].dtype)
    sizes = {layer.name: (len(factors[layer.name][0]), layer.scaling) for layer in lora.layers}
    config = {**lora.config, **rank_fields(sizes), "inference_mode": True}

    def fill(part: Path) -> None:
        save_lora(part, tensors, config)
        copy_processing(lora.folder, part)
        write_file(part / FIT_RECORD, json.dumps(without_nan(record), indent=2, allow_nan=False) + "\n")
        for name, text in (beside or {}).items():
            write_file(part / name, text)

    write_folder(out, fill)


@torch.no_grad()
def cut_live(model: Any, factors: Factors, adapter: str = "default") -> None:
    """Give the live adapter these factors, in ordinary `nn.Linear` slots, and bring PEFT's config in line. All that is
    trained of it is a new Parameter."""
    if adapted_layers(model, adapter):
        detach(model, adapter)
    factors, sizes = on_disk(factors), {}
    for name, module in lora_layers(model, adapter).items():
        for slots, factor in zip((module.lora_A, module.lora_B), factors[name], strict=True):
            slot = slots[adapter]
            weight = factor.detach().to(slot.weight).contiguous()
            weight = nn.Parameter(weight, requires_grad=slot.weight.requires_grad)
            slots[adapter] = linear(weight, slot.bias).train(slot.training)
        rank, scaling = len(factors[name][0]), module.scaling[adapter]
        module.r[adapter], module.lora_alpha[adapter] = rank, whole_number(scaling * rank)
        module.use_rslora[adapter] = False
        if (dora := dict(module.lora_magnitude_vector.items()).get(adapter)) is not None:
            dora.train(True).train(module.training)  # norms that DoraCaching keeps are forgotten by this
        sizes[name] = rank, scaling
    config = copy.deepcopy(model.peft_config[adapter])  # the user may reuse the object
    for key, value in rank_fields(sizes).items():
        setattr(config, key, value)
    model.peft_config[adapter] = config


def check_out(out: Path, overwrite: bool = False) -> None:
    """Raise ValueError where `out` may not be written: a link, a place without permission, or a folder that holds
    anything but, with `overwrite`, an earlier fit."""
    refuse_occupied(out, [FIT_RECORD], "fit", overwrite)

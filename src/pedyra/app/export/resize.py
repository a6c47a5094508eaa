"""pedyra resize: a LoRA of another rank without rows, by the singular values of its update, and so without a proof."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pedyra.errors import UserError
from pedyra.export.destinations import Destination
from pedyra.export.readers import RECORD as EXPORTED
from pedyra.export.readers import export_lora
from pedyra.fitting.cut import RECORD as CUT
from pedyra.fitting.cut import Factors, write_cut
from pedyra.fitting.singular import Singular, ranks_of_size, singular
from pedyra.lora.files import refuse_occupied
from pedyra.lora.folder import SavedLora, read_lora


@dataclass(frozen=True)
class Size:
    """How small: exactly one of the three."""

    rank: int | None = None
    """Of every layer, or all that it has."""
    energy: float | None = None
    """The part of the sum of squared singular values that each layer keeps."""
    megabytes: float | None = None
    """Of the file of weights, heads and magnitudes included."""

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.rank, self.energy, self.megabytes)) != 1:
            raise UserError("give one of --rank, --energy and --mb, or a destination with a rank, such as --for vllm:8")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"--rank is {self.rank}; give a rank of at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UserError(f"--energy is {self.energy:g}; give a part of the energy, such as 0.95")


@dataclass(frozen=True)
class Resized:
    """What `pedyra resize` has written."""

    source: Path
    out: Path
    rows: list[dict[str, Any]]
    """One a layer: layer, rank, of, parameters, energy."""
    parameters: int
    of: int
    error: float
    """Frobenius norm of what is left out of s B A over all layers, as a part of that of the whole."""
    commands: list[str]

    def summary(self) -> dict[str, Any]:
        """The row of the whole: the fields of `fit` that both know, and the error."""
        shares = {"parameters": self.parameters, "of": self.of, "share": self.parameters / self.of}
        return {**shares, "frobenius_error": self.error, "proved": False}

    def lines(self) -> list[str]:
        ranks, before = [row["rank"] for row in self.rows], [row["of"] for row in self.rows]
        given, out = shlex.quote(str(self.source)), shlex.quote(str(self.out))
        return [
            f"rank        {_ranks(before)} -> {_ranks(ranks)}; {self.parameters:,} of {self.of:,} parameters",
            f"left out    {self.error:.1%} of the norm of the update, which says nothing about the loss: not proved",
            f"prove       pedyra prove {given} {out} --data ROWS",
            f"adapter     {self.out}",
            *(f"{'' if number else 'serve':12}{line}" for number, line in enumerate(self.commands)),
        ]


def _ranks(ranks: list[int]) -> str:
    return (
        f"{max(ranks)}" if len(set(ranks)) == 1 else f"{max(ranks)} at most, {sum(ranks) / len(ranks):.3g} on average"
    )


def resize_adapter(
    source: Path, out: Path, size: Size, place: Destination | None = None, *, overwrite: bool = False
) -> Resized:
    """Write the adapter of the folder `source` into `out` with the first singular directions of each layer's update.

    The scaling of each layer stays, and so do DoRA's magnitudes, biases and modules that were trained whole. With a
    `place` it is written in the form that this destination reads. Raises ValueError: it is no plain LoRA, the size is
    none, the place refuses it, or `out` holds anything but, with `overwrite`, an earlier one.
    """
    refuse_occupied(out, [CUT, EXPORTED], "resized adapter", overwrite)
    lora = read_lora(source)
    lora.check_supported("peft")
    found = {layer.name: _singular(lora, layer.name) for layer in lora.layers}
    ranks = _ranks_for(lora, found, size)
    if place is not None:
        place.check(lora, max(ranks.values()))
    factors: Factors = {}
    for layer in lora.layers:
        A, B = (lora.tensors[layer.keys[slot]] for slot in "AB")
        rank = ranks[layer.name]
        if rank == len(A):
            factors[layer.name] = A, B  # to the last bit
            continue
        rows, columns = found[layer.name].factors(rank)
        # A convolution has the dimensions of its kernel behind the rank's.
        factors[layer.name] = rows.reshape(-1, *A.shape[1:]), columns.reshape(*columns.shape, *B.shape[2:])
    rows = _rows(lora, found, ranks)
    error = _error(lora, found, ranks)
    record = {"resized": True, "proved": False, "frobenius_error": error, "ranks": ranks}
    commands: list[str] = []
    if place is None:
        write_cut(lora, factors, out, record)
    else:
        with TemporaryDirectory() as scratch:
            write_cut(lora, factors, Path(scratch, "cut"), record)
            export_lora(Path(scratch, "cut"), place.form, out)
        commands = place.commands({out.name: read_lora(out)})
    after, before = (sum(row[name] for row in rows) for name in ("parameters", "before"))
    told = [{name: value for name, value in row.items() if name != "before"} for row in rows]
    return Resized(source, out, told, after, before, error, commands)


def _singular(lora: SavedLora, name: str) -> Singular:
    (keys,) = (layer.keys for layer in lora.layers if layer.name == name)
    A, B = (lora.tensors[keys[slot]] for slot in "AB")
    return singular(A.flatten(1), B.flatten(1))


def _ranks_for(lora: SavedLora, found: dict[str, Singular], size: Size) -> dict[str, int]:
    if size.rank is not None:
        return {layer.name: min(size.rank, layer.rank) for layer in lora.layers}
    if size.energy is not None:
        return {name: each.rank_of_energy(size.energy) for name, each in found.items()}
    assert size.megabytes is not None
    key = lora.layers[0].keys["A"]
    width = lora.tensors[key].element_size()
    others = _bytes(lora, lora.others)
    if (left := int(size.megabytes * 1e6) - others) <= 0:
        raise UserError(f"what is no factor has {others / 1e6:.3g} MB alone, more than --mb {size.megabytes:g}")
    try:
        return ranks_of_size(found, {layer.name: layer.scaling for layer in lora.layers}, left // width)
    except ValueError as error:
        raise UserError(f"--mb {size.megabytes:g} is too small: {error}") from None


def _bytes(lora: SavedLora, keys: Iterable[str]) -> int:
    return sum(lora.tensors[key].nbytes for key in keys)


def _rows(lora: SavedLora, found: dict[str, Singular], ranks: dict[str, int]) -> list[dict[str, Any]]:
    rows = []
    for layer in lora.layers:
        rank, each = ranks[layer.name], found[layer.name]
        width = each.U.shape[0] + each.V.shape[1]
        rows.append(
            {
                "layer": layer.name,
                "rank": rank,
                "of": layer.rank,
                "parameters": rank * width,
                "before": layer.rank * width,
                "energy": each.kept(rank),
            }
        )
    return rows


def _error(lora: SavedLora, found: dict[str, Singular], ranks: dict[str, int]) -> float:
    """Over all layers together, each with its scaling."""
    energies = {layer.name: (layer.scaling * found[layer.name].values).square() for layer in lora.layers}
    gone = sum(float(energy[ranks[name] :].sum()) for name, energy in energies.items())
    whole = sum(float(energy.sum()) for energy in energies.values())
    return sqrt(gone / whole) if whole else 0.0

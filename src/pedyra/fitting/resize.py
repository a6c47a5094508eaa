"""pedyra resize makes a LoRA of a lower rank without rows, by the singular values of its update, and proves nothing."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pedyra.errors import UserError
from pedyra.export.destinations import Destination
from pedyra.export.readers import RECORD as EXPORTED
from pedyra.export.readers import check_convertible, export_lora
from pedyra.fitting.cut import FIT_RECORD, Factors, write_cut
from pedyra.lora.files import refuse_occupied
from pedyra.lora.folder import SavedLora, read_lora
from pedyra.lora.singular import Singular, singular


@dataclass(frozen=True)
class Size:
    """How small the adapter becomes; exactly one of the three is set."""

    rank: int | None = None
    """Rank of each layer, or all that it has."""
    energy: float | None = None
    """Part of the sum of its squared singular values that each layer keeps."""
    megabytes: float | None = None
    """All layers get the highest rank with which the file of weights, heads and all, takes no more."""

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.rank, self.energy, self.megabytes)) != 1:
            raise UserError("give one of --rank, --energy and --mb, or a destination with a rank, such as --for vllm:8")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"--rank is {self.rank}; give a rank of at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UserError(f"--energy is {self.energy:g}; give a part of the energy, such as 0.95")

    def of(self, directions: Singular) -> int:
        """Return the rank of a layer."""
        return min(self.rank, len(directions.values)) if self.rank else directions.rank_of_energy(self.energy or 1.0)


def rank_within(lora: SavedLora, megabytes: float) -> int:
    """Return the highest rank of all layers with which the weights take no more. Raises UserError: none does."""
    fixed, each = sum(tensor.nbytes for tensor in lora.tensors.values()), []
    for layer in lora.layers:
        factors = sum(lora.tensors[layer.keys[slot]].nbytes for slot in "AB")
        fixed -= factors
        each.append((layer.rank, factors // layer.rank))

    def taken(rank: int) -> float:
        return (fixed + sum(min(rank, highest) * nbytes for highest, nbytes in each)) / 1e6

    for rank in range(max(layer.rank for layer in lora.layers), 0, -1):
        if taken(rank) <= megabytes:
            return rank
    raise UserError(f"--mb is {megabytes:g}, and at rank 1 the adapter takes {taken(1):.3g}; give that or more")


@dataclass(frozen=True)
class Resized:
    """The result of `pedyra resize`."""

    source: Path
    out: Path
    rows: list[dict[str, Any]]
    """One for each layer: layer, rank, of, parameters, energy."""
    parameters: int
    of: int
    error: float
    """Frobenius norm of the removed part of s B A over all layers, relative to the whole."""
    commands: list[str]
    dropped: list[str]
    """Layers that keep nothing, since the place leaves their LoRA out."""

    def summary(self) -> dict[str, Any]:
        """Return the row of the whole: the fields of `fit` that both know, and the error."""
        shares = {"parameters": self.parameters, "of": self.of, "share": self.parameters / self.of}
        return {**shares, "frobenius_error": self.error, "proved": False}

    def lines(self) -> list[str]:
        ranks, before = [row["rank"] for row in self.rows], [row["of"] for row in self.rows]
        source, out = shlex.quote(str(self.source)), shlex.quote(str(self.out))
        return [
            f"rank        {_ranks(before)} -> {_ranks(ranks)}; {self.parameters:,} of {self.of:,} parameters",
            f"left out    {self.error:.1%} of the norm of the update, which says nothing about the loss: not proved",
            *([f"without     {' and '.join(self.dropped)}, whose LoRA is left out there"] if self.dropped else []),
            f"prove       pedyra prove {source} {out} --data ROWS",
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
    `place` it is written in the form that this destination reads, without the layers that it leaves out. Raises
    ValueError: it is no plain LoRA, the size is none, the place refuses it, or `out` holds anything but, with
    `overwrite`, an earlier one.
    """
    refuse_occupied(out, [FIT_RECORD, EXPORTED], "resized adapter", overwrite)
    lora = read_lora(source)
    check_convertible(lora, "peft" if place is None else place.form)
    if size.megabytes is not None:
        size = Size(rank=rank_within(lora, size.megabytes))
    dropped = [] if place is None else place.dropped(layer.name for layer in lora.layers)
    factors: Factors = {}
    rows, lost, whole, before = [], 0.0, 0.0, 0
    for layer in lora.layers:
        A, B = (lora.tensors[layer.keys[slot]] for slot in "AB")
        directions = singular(A.flatten(1), B.flatten(1))
        rank = 0 if layer.name in dropped else size.of(directions)
        width = directions.U.shape[0] + directions.V.shape[1]
        energy = (layer.scaling * directions.values).square()
        lost, whole = lost + float(energy[rank:].sum()), whole + float(energy.sum())
        row = {"layer": layer.name, "rank": rank, "of": layer.rank, "parameters": rank * width}
        rows.append({**row, "energy": directions.kept(rank)})
        before += layer.rank * width
        if rank == len(A):
            factors[layer.name] = A, B  # to the last bit
            continue
        first, second = directions.factors(rank)
        # A convolution has the dimensions of its kernel behind the rank's.
        factors[layer.name] = first.reshape(rank, *A.shape[1:]), second.reshape(*second.shape, *B.shape[2:])
    ranks = {row["layer"]: row["rank"] for row in rows}
    error = sqrt(lost / whole) if whole else 0.0
    record = {"resized": True, "proved": False, "frobenius_error": error, "ranks": ranks}
    commands: list[str] = []
    if place is None:
        write_cut(lora, factors, out, record)
    else:
        with TemporaryDirectory() as scratch:
            write_cut(lora, factors, cut := Path(scratch, "cut"), record)
            place.check(read_lora(cut, lora.title), max(ranks.values()))
            export_lora(cut, place.form, out)
        commands = place.commands({out.name: read_lora(out)})
    return Resized(source, out, rows, sum(row["parameters"] for row in rows), before, error, commands, dropped)

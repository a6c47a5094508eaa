"""The smaller adapter in the form, and at the rank, of the place where it will be served, and what it saves there."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from pedyra.app.export.destinations import Destination
from pedyra.app.export.export import export_adapter
from pedyra.fitting.cut import CURVE, RECORD
from pedyra.fitting.result import Fit
from pedyra.fitting.sizes import ranks_below
from pedyra.lora.files import write_folder
from pedyra.lora.folder import SavedLora

KEPT = (RECORD, CURVE, "README.md")
"""Beside an exported adapter: how it was chosen and proved."""


def ranks_of(place: Destination, lora: SavedLora) -> list[int]:
    """The ranks to ask, in this order: those of the place from the adapter's own down or, where it takes any, those
    that a fit asks."""
    first, *below = place.ranks_below(max(layer.rank for layer in lora.layers))
    return [first, *(below if place.ranks else [rank for rank in ranks_below(first) if rank >= place.least])]


def write_for(found: Fit, lora: SavedLora, place: Destination, out: Path) -> None:
    """Write the smaller adapter into `out` as the place reads it, whole or not at all."""
    with TemporaryDirectory() as scratch:
        raw, formed = Path(scratch, "raw"), Path(scratch, "formed")
        found.write(lora, raw)
        if place.form == "peft":
            formed = raw
        else:
            export_adapter(raw, place.form, formed)
            for name in KEPT:
                shutil.copy2(raw / name, formed / name)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_folder(out, lambda part: shutil.copytree(formed, part, dirs_exist_ok=True))


def served_lines(found: Fit, lora: SavedLora, place: Destination, out: Path) -> list[str]:
    """The rank at which the place holds the smaller adapter, what it reserves for it, and how it is served."""
    kept = {name: rank for name, rank in found.ranks.items() if rank}
    before, after = (place.rank_for(max(ranks)) for ranks in ([x.rank for x in lora.layers], kept.values()))
    lines = [f"for         {place.title}, which held it at a rank of {_rank(before)}, and now at {_rank(after)}"]
    if place.pads and after is not None:
        now = place.reserved_bytes(_widths(found.model, kept), after)
        told = f"{now / 1e6:,.1f} MB a slot"
        if before is not None:
            was = place.reserved_bytes(_widths(found.model, [layer.name for layer in lora.layers]), before)
            told = f"{was / 1e6:,.1f} MB a slot before, {told} now"
        lines.append(f"reserves    {told}, in the layers of its own modules")
    seen = f"seen with {place.title} {place.seen}" if place.seen else f"not run here; by {place.sources[0]}"
    lines.append(f"seen        {seen}")
    return [*lines, *served_together(place, base_name(lora), {out.name: (out, found)})]


def served_together(place: Destination, base: str, fits: Mapping[str, tuple[Path, Fit]]) -> list[str]:
    """The lines that serve these smaller adapters, name -> folder and fit, on one server: at the largest of the ranks
    at which the place holds them, which is what it reserves for each."""
    rank = max(place.rank_for(found.chosen.rank) or found.chosen.rank for _, found in fits.values())
    layers = {name for _, found in fits.values() for name, kept in found.ranks.items() if kept}
    folders = {name: folder for name, (folder, _) in fits.items()}
    commands = place.commands(base, folders, place.rank or rank, _ends(layers))
    return [f"{'' if number else 'serve':12}{line}" for number, line in enumerate(commands)]


def base_name(lora: SavedLora) -> str:
    """The base that the adapter names, or a word to put one in the place of."""
    return str(lora.config.get("base_model_name_or_path") or "BASE")


def served_by(place: Destination, lora: SavedLora, out: Path) -> list[str]:
    """The lines of a shell that serve the adapter in `out` there."""
    largest = max(layer.rank for layer in lora.layers)
    rank = place.rank or place.rank_for(largest) or largest
    return place.commands(base_name(lora), {out.name: out}, rank, _ends([layer.name for layer in lora.layers]))


def _rank(rank: int | None) -> str:
    return "none: it is too large" if rank is None else str(rank)


def _ends(names: Collection[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _widths(model: Any, names: Collection[str]) -> Iterator[tuple[int, int]]:
    """(inputs, outputs) of every layer that a server wraps where it is told the modules of these layers."""
    ends = {*_ends(names)}
    modules: Mapping[str, nn.Module] = dict(model.get_base_model().named_modules())
    for name, module in modules.items():
        if name.rpartition(".")[2] in ends and hasattr(module, "in_features") and hasattr(module, "out_features"):
            yield int(module.in_features), int(module.out_features)  # pyright: ignore[reportArgumentType]

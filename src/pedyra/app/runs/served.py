"""The command lines that serve an adapter, and what a destination saves by a smaller one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pedyra.export.destinations import Destination, destination
from pedyra.export.loading import python_line
from pedyra.fitting.result import Fit
from pedyra.lora.files import read_json
from pedyra.lora.folder import SavedLora, read_lora


def serving_lines(folder: Path, target: str) -> list[str]:
    """Write the command lines that load an export without a destination: llama.cpp's for gguf, transformers' for merged
    weights, else PEFT's."""
    if target == "merged":
        architectures = read_json(folder / "config.json").get("architectures") or ["AutoModel"]
        return [python_line(f"from transformers import {architectures[0]} as Model", folder)]
    return destination("llama.cpp" if target == "gguf" else "peft").commands({folder.name: read_lora(folder)})


def served_lines(result: Fit, lora: SavedLora, place: Destination, out: Path) -> list[str]:
    """Write the rank of the smaller adapter at the destination, the memory that it reserves, and the command lines."""
    before, after = (place.rank_for(rank) for rank in (max(layer.rank for layer in lora.layers), result.chosen.rank))
    was, now = ("none: it is too large" if rank is None else rank for rank in (before, after))
    lines = [f"for         {place.title}, which held it at a rank of {was}, and now at {now}"]
    if place.pads and after is not None:
        names = [layer.name for layer in lora.layers]  # of all, since one that keeps nothing has a row of zeros
        slots = [
            f"{place.slot_bytes(_widths(result.model, names, place), rank) / 1e6:,.1f} MB a slot {when}"
            for rank, when in ((before, "before"), (after, "now"))
            if rank is not None
        ]
        lines.append(f"reserves    {', '.join(slots)}, in the layers of its own modules")
    evidence = f"seen with {place.title} {place.seen}" if place.seen else f"not run here; by {place.sources[0]}"
    lines.append(f"seen        {evidence}")
    return [*lines, *served_together(place, {out.name: out})]


def served_together(place: Destination, folders: Mapping[str, Path]) -> list[str]:
    """Write the command lines that serve these adapters (name -> folder) on one server, at the largest of their ranks,
    which the server reserves for each."""
    return with_label(place.commands({name: read_lora(folder) for name, folder in folders.items()}))


def with_label(commands: Sequence[str]) -> list[str]:
    return [f"{'' if number else 'serve':12}{line}" for number, line in enumerate(commands)]


def _widths(model: Any, names: Collection[str], place: Destination) -> Iterator[tuple[int, int]]:
    """Yield (inputs, outputs) of every layer that a server wraps for the modules of these layers."""
    ends = {name.rpartition(".")[2] for name in names}
    for name, module in model.get_base_model().named_modules():
        if name.rpartition(".")[2] in ends and hasattr(module, "in_features") and not place.dropped([name]):
            yield module.in_features, module.out_features

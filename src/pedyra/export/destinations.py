"""Each place where a LoRA is served takes what its row of destinations.yaml says, which is a record here.

What limits the size of a LoRA in practice is its server: a highest rank, one rank for all layers, a slot that is
reserved at one rank however small the adapter is. Whatever depends on a reader asks its record here.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from pedyra.errors import UserError
from pedyra.export.loading import loading_line
from pedyra.lora.folder import SavedLora
from pedyra.lora.spelling import did_you_mean

SERVED_BYTES = 2
"""Bytes in which a server holds a parameter: bfloat16 or float16."""


@dataclass(frozen=True)
class Refusal:
    """The reason why a destination does not take an adapter, and what its owner can do."""

    field: str
    reason: str
    repair: str

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}; {self.repair}"


@dataclass(frozen=True)
class Destination:
    """A place that serves a LoRA. The fields are those of destinations.yaml, which says what each means."""

    name: str
    title: str
    ranks: tuple[int, ...]
    """All that it takes, rising; empty: a range."""
    least: int
    most: int | None
    mixed: bool
    reads: Literal["patterns", "rank", "one"]
    rslora: bool
    form: Literal["peft", "padded", "gguf"]
    pads: bool
    refuses: Mapping[str, tuple[str, str]]
    serve: tuple[str, ...]
    seen: str | None
    sources: tuple[str, ...]
    whole: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    largest_mb: int | None = None
    rank: int | None = field(default=None, compare=False)
    """The rank that was asked for: 16 of "vllm:16"."""

    def rank_for(self, largest: int) -> int | None:
        """Find the smallest rank of this place that holds one whose largest rank is this; None: it is too large."""
        if self.ranks:
            return next((rank for rank in self.ranks if rank >= largest), None)
        rank = max(self.least, largest)
        return rank if self.most is None or rank <= self.most else None

    def refusals(self, lora: SavedLora) -> list[Refusal]:
        """Find everything in this adapter that the place does not take, each with its repair; a rank that is too high
        is not one of them, since a smaller one is what a fit or `pedyra resize` makes."""
        config = lora.config
        given = {name for name in self.refuses if config.get(name)}
        if config.get("bias") in (None, "none"):
            given -= {"bias"}
        if all(name in self.whole for name in config.get("modules_to_save") or ()):
            given -= {"modules_to_save"}
        if "embeddings" in self.refuses and any("embed_tokens" in key or "lm_head" in key for key in lora.others):
            given |= {"embeddings"}
        # PEFT adds the embedding of a vocabulary that was resized, of which no field tells.
        heads = tuple(f"{name}.{kind}" for name in self.whole for kind in ("weight", "bias"))
        if "tensors" in self.refuses and not given and any(not key.endswith(heads) for key in lora.others):
            given |= {"tensors"}
        found = [Refusal(name, *self.refuses[name]) for name in self.refuses if name in given]
        names = sorted({layer.name.rpartition(".")[2] for layer in lora.layers})
        if self.modules and (others := [name for name in names if name not in self.modules]):
            found.append(Refusal("target_modules", f"it takes no {' and no '.join(others)}", "train other modules"))
        for parent in sorted({layer.name.rpartition(".")[0] for layer in lora.layers}):
            ends = {layer.name.rpartition(".")[2] for layer in lora.layers if layer.name.startswith(f"{parent}.")}
            gone = [name for name in self.together if name not in ends]
            if gone and len(gone) < len(self.together):
                told = f"{parent} has {' and '.join(ends & {*self.together})} without {' and '.join(gone)}"
                found.append(Refusal("target_modules", f"it stacks the two, and {told}", "keep a rank of 1 in each"))
                break
        return found

    def check(self, lora: SavedLora, largest: int | None = None) -> None:
        """Raise ValueError for the first thing in this adapter that the place does not take, with the repair; or for
        its largest rank, if that is given."""
        if refused := self.refusals(lora):
            raise UserError(f"{self.title} does not take {lora.title}: {refused[0]}")
        if largest is None:
            return
        if largest < self.least:
            raise UserError(f"{self.title} holds adapters from rank {self.least} up, and this one has rank {largest}")
        if self.rank_for(largest) is not None and largest <= (self.rank or largest):
            self._check_bytes(lora, largest)
            return
        most = self.rank or (self.ranks[-1] if self.ranks else self.most)
        raise UserError(
            f"{self.title} holds adapters up to rank {most}, and this one has rank {largest}; ask for less: pedyra fit "
            f"ADAPTER --data ROWS --for {self.name}, or without rows pedyra resize ADAPTER --for {self.name}:{most}"
        )

    def _check_bytes(self, lora: SavedLora, largest: int) -> None:
        """Refuse what would be too large a file with every layer at this rank."""
        if self.largest_mb is None:
            return
        factors = [(lora.tensors[layer.keys[slot]], layer.rank) for layer in lora.layers for slot in "AB"]
        size = sum(each.numel() * each.element_size() * largest / rank for each, rank in factors) / 1e6
        if size >= self.largest_mb:
            raise UserError(
                f"{self.title} takes adapters below {self.largest_mb} MB, and at rank {largest} this one has "
                f"{size:,.0f}; ask for less: pedyra fit ADAPTER --data ROWS --for {self.name}:{max(1, largest // 2)}"
            )

    def slot_bytes(self, widths: Iterable[tuple[int, int]], rank: int) -> int:
        """Count the bytes that a slot of the server has at this rank, in two bytes a parameter; of a place that does
        not pad, what one adapter takes.

        Args:
            widths: (inputs, outputs) of each layer of the base that is wrapped, whether the adapter has it or not.
        """
        return rank * sum(inputs + outputs for inputs, outputs in widths) * SERVED_BYTES

    def commands(self, adapters: Mapping[str, SavedLora]) -> list[str]:
        """Write the lines of a shell that serve these adapters, by their names, on their base: at the rank that was
        asked for, else the least that holds them all.

        vLLM and SGLang are told the modules that any of them has, which they wrap, and reserve slots in. A server
        without a flag for several takes each adapter by a line of its own."""
        first, *_ = adapters.values()
        layers = [layer for lora in adapters.values() for layer in lora.layers]
        largest = max(layer.rank for layer in layers)
        base = base_name(first)
        # llama.cpp's --base takes a folder; a repository on the Hub has an option of its own.
        here = base == "BASE" or base.startswith((".", "/", "~")) or Path(base).exists()
        revision = None if here else first.config.get("revision")
        folders = {name: shlex.quote(str(lora.folder)) for name, lora in adapters.items()}
        joined = " ".join(f"{shlex.quote(name)}={folder}" for name, folder in folders.items())
        lines: list[str] = []
        for template in self.serve:
            for name, lora in adapters.items():
                line = template.format(
                    base=shlex.quote(base),
                    base_option="--base" if here else "--base-model-id",
                    revision=f" --revision {shlex.quote(revision)}" if revision else "",
                    adapters=joined,
                    count=len(adapters),
                    rank=self.rank or self.rank_for(largest) or largest,
                    modules=" ".join(sorted({layer.name.rpartition(".")[2] for layer in layers})),
                    name=shlex.quote(name),
                    folder=folders[name],
                    load=loading_line(lora),
                )
                if line not in lines:
                    lines.append(line)
        return lines


def base_name(lora: SavedLora) -> str:
    """Name the base of the adapter, or a word to put one in the place of."""
    return str(lora.config.get("base_model_name_or_path") or "BASE")


@cache
def destinations() -> dict[str, Destination]:
    """Read all there are, by name."""
    rows = yaml.safe_load(Path(__file__).with_name("destinations.yaml").read_text(encoding="utf-8"))
    return {name: _record(name, row) for name, row in rows.items()}


def _record(name: str, row: Mapping[str, Any]) -> Destination:
    ranks = row["ranks"]
    if isinstance(ranks, list):
        listed, least, most = tuple(ranks), ranks[0], ranks[-1]
    else:
        listed, least, most = (), ranks["least"], ranks["most"]
    lists = {key: tuple(row.get(key, ())) for key in ("serve", "sources", "whole", "modules", "together")}
    refuses = {key: (reason, repair) for key, (reason, repair) in row["refuses"].items()}
    plain = {key: value for key, value in row.items() if key not in {"ranks", "refuses", *lists}}
    return Destination(name=name, ranks=listed, least=least, most=most, refuses=refuses, **lists, **plain)


def destination(text: str) -> Destination:
    """Find the destination that is written as its name, or with a rank that it takes: "vllm", "vllm:16". Raises
    ValueError, one line that says which there are."""
    name, colon, rank = text.partition(":")
    known = destinations()
    if name not in known:
        near = did_you_mean(name, known, otherwise="")
        listed = f"there are {', '.join(known)}"
        raise UserError(f"destination {name!r} is unknown: {near + ' ' if near else ''}{listed}")
    found = known[name]
    if not colon:
        return found
    if not rank.isdecimal() or found.rank_for(int(rank)) != int(rank) or int(rank) < 1:
        ranks = ", ".join(map(str, found.ranks)) or f"{found.least} to {found.most or 'any'}"
        raise UserError(
            f"destination {text!r}: {found.title} holds adapters at a rank of {ranks}, not {rank or 'none'}"
        )
    return replace(found, rank=int(rank))

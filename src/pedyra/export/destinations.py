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
from pedyra.export.loading import class_name, head_line, loading_line, num_labels
from pedyra.lora.folder import SavedLayer, SavedLora
from pedyra.lora.spelling import did_you_mean
from pedyra.lora.supported import kinds_of

SERVED_BYTES = 2
"""Bytes in which a server holds a parameter: bfloat16 or float16."""


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
    drops: tuple[str, ...] = ()
    head: str | None = None
    largest_mb: int | None = None
    rank: int | None = field(default=None, compare=False)
    """The requested rank: 16 of "vllm:16"."""

    def rank_for(self, largest: int) -> int | None:
        """Find the smallest rank of this place that holds one whose largest rank is this; None: it is too large."""
        if self.ranks:
            return next((rank for rank in self.ranks if rank >= largest), None)
        rank = max(self.least, largest)
        return rank if self.most is None or rank <= self.most else None

    def refusals(self, lora: SavedLora) -> list[tuple[str, str]]:
        """List everything in this adapter that the row of the place refuses: the field, and a reason with the repair.
        What its form cannot hold is said in `lora.supported`; a rank that is too high, or a layer that is left out, a
        fit or `pedyra resize` mends."""
        present = self._refused(lora)
        refusals = [(name, "; ".join(words)) for name, words in self.refuses.items() if name in present]
        ends = sorted({layer.name.rpartition(".")[2] for layer in lora.layers})
        if self.modules and (others := [end for end in ends if end not in self.modules]):
            refusals.append(("target_modules", f"it takes no {' and no '.join(others)}; train other modules"))
        for parent in sorted({layer.name.rpartition(".")[0] for layer in lora.layers}):
            ends = {layer.name.rpartition(".")[2] for layer in lora.layers if layer.name.startswith(f"{parent}.")}
            lacking = [name for name in self.together if name not in ends]
            if lacking and len(lacking) < len(self.together):
                both = f"{parent} has {' and '.join(ends & {*self.together})} without {' and '.join(lacking)}"
                refusals.append(("target_modules", f"it stacks the two, and {both}; keep a rank of 1 in each"))
                break
        return refusals

    def refused_for(self, lora: SavedLora) -> list[str]:
        """Name everything in this adapter for which the place does not serve it as it is: fields of its config,
        "tensors" and "embeddings" that only the file shows, and "layers" that would be left out."""
        kinds = [kind.sign for kind in kinds_of(lora.config, lora.kinds.values()) if self.form in kind.refused]
        fields = [name for name, _ in self.refusals(lora)]
        return [*kinds, *fields, *(["layers"] if self._lost(lora) else [])]

    def _refused(self, lora: SavedLora) -> set[str]:
        """Return the keys of `refuses` that this adapter has."""
        config = lora.config
        names = {name for name in self.refuses if config.get(name)}
        if config.get("bias") in (None, "none"):
            names -= {"bias"}
        if all(name in self.whole for name in config.get("modules_to_save") or ()):
            names -= {"modules_to_save"}
        if "embeddings" in self.refuses and any("embed_tokens" in key or "lm_head" in key for key in lora.others):
            names |= {"embeddings"}
        # PEFT adds the embedding of a vocabulary that was resized, of which no field tells.
        heads = tuple(f"{name}.{kind}" for name in self.whole for kind in ("weight", "bias"))
        if "tensors" in self.refuses and not names and any(not key.endswith(heads) for key in lora.others):
            names |= {"tensors"}
        return names

    def dropped(self, names: Iterable[str]) -> list[str]:
        """Return those of these layers whose LoRA the place leaves out without a word."""
        return [name for name in names if any(f".{part}." in f".{name}." for part in self.drops)]

    def _lost(self, lora: SavedLora) -> list[str]:
        """Return the layers of the adapter that do something, and would be left out."""
        layers = {layer.name: layer for layer in lora.layers}
        return [name for name in self.dropped(layers) if bool(lora.tensors[layers[name].keys["B"]].any())]

    def check(self, lora: SavedLora, largest: int | None = None) -> None:
        """Raise ValueError for the first thing in this adapter that the place or its form does not take, with the
        repair; and, if its largest rank is given, for that, and for a layer that would be left out."""
        lora.check_supported(self.form)
        if refusals := self.refusals(lora):
            raise UserError(f"{self.title} does not take {lora.title}: {': '.join(refusals[0])}")
        if largest is None:
            return
        if lost := self._lost(lora):
            raise UserError(
                f"{self.title} leaves the LoRA of {lost[0]} in {lora.title} out without a word; a fit cuts it away and "
                f"proves the rest (pedyra fit ADAPTER --data ROWS --for {self.name}), pedyra resize cuts without a "
                f"proof, and pedyra export --target merged keeps it"
            )
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

        vLLM and SGLang get the modules that any of them has, which they wrap, and reserve slots in. A server
        without a flag for several takes each adapter by a line of its own."""
        first, *_ = adapters.values()
        layers = [layer for lora in adapters.values() for layer in lora.layers]
        largest = max(layer.rank for layer in layers)
        base = base_name(first)
        # llama.cpp's --base takes a folder; a repository on the Hub has an option of its own.
        here = base == "BASE" or base.startswith((".", "/", "~")) or Path(base).exists()
        revision = None if here else first.config.get("revision")
        folders = {name: shlex.quote(str(lora.folder)) for name, lora in adapters.items()}
        values = {
            "base": shlex.quote(base),
            "base_option": "--base" if here else "--base-model-id",
            "revision": f" --revision {shlex.quote(revision)}" if revision else "",
            "adapters": " ".join(f"{shlex.quote(name)}={folder}" for name, folder in folders.items()),
            "count": len(adapters),
            "rank": self.rank or self.rank_for(largest) or largest,
        }
        lines: list[str] = []
        labels = max((num_labels(lora) or 0 for lora in adapters.values()), default=0)
        if self.head and labels:
            folder = f"{Path(base).name}-{class_name(first).removeprefix('AutoModelFor')}"
            lines.append(head_line(first, base, labels, revision, folder))
            tokenizer = f" --tokenizer-revision {shlex.quote(revision)}" if revision else ""
            head = self.head.format(base=values["base"], revision=tokenizer)
            values |= {"base": shlex.quote(folder), "revision": head}
        values["modules"] = " ".join(self._wrapped(layers, bool(lines)))
        for template in self.serve:
            for name, lora in adapters.items():
                own = {"name": shlex.quote(name), "folder": folders[name], "load": loading_line(lora)}
                line = template.format(**values, **own)
                if line not in lines:
                    lines.append(line)
        return lines

    def _wrapped(self, layers: Iterable[SavedLayer], classifies: bool) -> list[str]:
        """Name the modules that a server has to wrap: by the ends of the layers' names, or, in a classifier, by the
        whole name where the end is also that of a layer which cannot be wrapped, at which vLLM ends with an error."""
        ends = {part.rpartition(".")[2] for part in self.drops} if classifies else set()
        names = {layer.name for layer in layers} - {*self.dropped(layer.name for layer in layers)}
        return sorted({name if (end := name.rpartition(".")[2]) in ends else end for name in names})


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
    lists = {key: tuple(row.get(key, ())) for key in ("serve", "sources", "whole", "modules", "together", "drops")}
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
    place = known[name]
    if not colon:
        return place
    if not rank.isdecimal() or place.rank_for(int(rank)) != int(rank) or int(rank) < 1:
        ranks = ", ".join(map(str, place.ranks)) or f"{place.least} to {place.most or 'any'}"
        raise UserError(
            f"destination {text!r}: {place.title} holds adapters at a rank of {ranks}, not {rank or 'none'}"
        )
    return replace(place, rank=int(rank))

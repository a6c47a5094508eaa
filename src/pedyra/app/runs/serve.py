"""`pedyra fit DIR DIR... --max-rank auto`: the least rank that a vLLM server can hold all of these adapters at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pedyra.app.runs.fit import Opened, Source, opened
from pedyra.fitting.cut import check_out
from pedyra.fitting.fit import NotWithin, Wanted
from pedyra.fitting.result import Fit
from pedyra.fitting.trainer import fit_trainer
from pedyra.lora.export import VLLM_RANKS, reserved_bytes, vllm_line, vllm_rank, why_not_in_vllm
from pedyra.lora.folder import read_lora


@dataclass(frozen=True, kw_only=True)
class Served:
    """Adapters that were made small enough for one padded rank."""

    rank: int
    """The `--max-lora-rank` of the server."""
    rank_before: int | None
    """The one that the adapters needed as they were; None: vLLM takes none so large."""
    saved: int | None
    """Bytes that a server which holds all of them at once no longer reserves; None where it could not hold them."""
    found: Mapping[str, Fit]
    """Name of the adapter's folder -> its fit."""
    line: str
    """The command that serves them."""
    refused: str | None
    """Why vLLM takes one of them at no rank."""


def fit_for_server(
    outs: Mapping[Path, Path],
    wanted: Wanted,
    source: Source,
    *,
    overwrite: bool = False,
    shown: bool = False,
    told: Callable[[str], None] = lambda _: None,
) -> Served:
    """Fit each adapter at the least of vLLM's ranks at which all are within their tolerance, and write them.

    The ranks that vLLM pads to are tried from the adapter's own down, until one is refused.

    Args:
        outs: folder of an adapter -> where its smaller one goes.
        told: gets a line about each attempt.

    Raises:
        ValueError: as `fit_folder`; an adapter of a rank that no server takes, and that no allowed one is within.
    """
    for out in outs.values():
        check_out(out, overwrite)
    loras = [read_lora(path) for path in outs]
    bases = {str(lora.config.get("base_model_name_or_path")) for lora in loras}
    if len(bases) > 1:
        raise ValueError(f"one server has one base model, but these adapters name {' and '.join(sorted(bases))}")
    before = vllm_rank(max(layer.rank for lora in loras for layer in lora.layers))
    rank, found = VLLM_RANKS[0], {}
    for path, out in outs.items():
        with opened(path, wanted, source, shown=shown) as each:
            rank, found[str(path)] = _least(each, wanted, rank, lambda line, path=path: told(f"{path}: {line}"))
            each.write(found[str(path)], out)
    saved = None if before is None else reserved_bytes(loras, before) - reserved_bytes(loras, rank)
    line = vllm_line(bases.pop(), _named(outs), rank)
    refused = next(filter(None, (why_not_in_vllm(lora.config) for lora in loras)), None)
    return Served(rank=rank, rank_before=before, saved=saved, found=found, line=line, refused=refused)


def _least(each: Opened, wanted: Wanted, at_least: int, told: Callable[[str], None]) -> tuple[int, Fit]:
    """The least of vLLM's ranks, from `at_least` on, at which the adapter is within tolerance, and its fit there.

    Ranks are asked from the largest down to the first that is refused: an order that the rows have no part in, as in
    the proof of a fit. From the least up, every further rank would be one more chance to be accepted by luck.
    """
    highest, found = max(layer.rank for layer in each.lora.layers), None
    most = max(at_least, vllm_rank(highest) or VLLM_RANKS[-1])
    refused: NotWithin | None = None
    for rank in reversed([rank for rank in VLLM_RANKS if at_least <= rank <= most]):
        try:
            found = rank, fit_trainer(each.trainer, replace(wanted, max_rank=min(rank, highest)))
        except NotWithin as error:
            told(f"rank {rank} is not within the tolerance")
            refused = error
            break
        told(f"rank {rank} is within the tolerance")
    if found is None:
        raise ValueError(f"{each.lora.title}: vLLM takes ranks up to {VLLM_RANKS[-1]}, and {refused}")
    return found


def _named(outs: Mapping[Path, Path]) -> dict[str, Path]:
    """The adapters by the names that a server calls them by: of the run or the folder, and where two are alike, of the
    whole path."""
    short = [each.parent.name if each.name == "adapter" else each.name for each in (path.resolve() for path in outs)]
    if len(set(short)) < len(short):
        short = [str(path).strip("/").replace("/", "-") for path in outs]
    return dict(zip(short, outs.values(), strict=True))

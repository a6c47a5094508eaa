"""A run's checkpoint folders are looked through for the last whole one, from which it resumes. It loads no torch."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from pedyra.errors import UserError
from pedyra.lora.files import SUMS, check_sums, read_sums

RANK_FILES = ("pedyra_state.safetensors", "pedyra_state.json")
"""The side files of `allocate.checkpoint`."""
ASIDE = "_saving"
"""A checkpoint is written, and removed, in this folder of a run; what a kill left there is of no use."""


def checkpoint_step(checkpoint: Path) -> int:
    """Read the step in the name of a checkpoint folder, `checkpoint-<step>`."""
    return int(checkpoint.name.rpartition("-")[2])


def list_checkpoints(run: Path) -> list[Path]:
    """List the checkpoint folders of a run, oldest step first, whole or not."""
    result = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    # A kill may have left two of a step: the one with a leading 0 was about to be replaced.
    return sorted(result, key=lambda path: (checkpoint_step(path), -len(path.name)))


def last_complete_checkpoint(run: Path, *, with_ranks: bool) -> tuple[Path, list[tuple[Path, str]]]:
    """Find the newest whole checkpoint, and the newer broken ones with the flaw of each. ValueError: there is none."""
    broken: list[tuple[Path, str]] = []
    for checkpoint in reversed(list_checkpoints(run)):
        flaw = find_flaw(checkpoint, with_ranks=with_ranks)
        if flaw is None:
            return checkpoint, broken
        broken.append((checkpoint, flaw))
    reason = f" ({broken[0][0].name}: {broken[0][1]})" if broken else ""
    raise UserError(f"{run} holds no complete checkpoint{reason}; start the run anew with --overwrite")


def find_flaw(checkpoint: Path, *, with_ranks: bool) -> str | None:
    """Tell which file of SHA256SUMS, which is written last, or of a run with ranks, is missing or damaged; or None."""
    try:
        check_sums(checkpoint, {**dict.fromkeys(RANK_FILES if with_ranks else ()), **read_sums(checkpoint)})
    except ValueError as error:
        return str(error).removeprefix(f"{checkpoint}/")
    return None


def check_loaded(checkpoint: Path) -> None:
    """Check the files that Trainer has loaded, which it does not: a missing one is warned of, and for a damaged one
    ValueError names a checkpoint that is whole. Side files are for `checkpoint.restore` to judge."""
    if not (checkpoint / SUMS).is_file():  # it was not saved with `save_whole`
        return
    try:
        listed = [name for name in read_sums(checkpoint) if name not in RANK_FILES]
        missing = [name for name in listed if not (checkpoint / name).is_file()]
        check_sums(checkpoint, [name for name in listed if name not in missing])
    except ValueError as error:
        older = [each for each in list_checkpoints(checkpoint.parent) if find_flaw(each, with_ranks=True) is None]
        repair = f"resume from {older[-1]}, which is whole" if older else "start anew"
        raise UserError(f"{error}; {repair}") from None
    if missing:
        warnings.warn(f"{checkpoint / missing[0]} is missing: this is no exact resume", stacklevel=2)

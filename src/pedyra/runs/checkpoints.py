"""Which of a run's Trainer checkpoints is whole: a crash or a full disk can leave one half-written."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

# Trainer writes these in this order, so trainer_state.json is there only when the others were begun.
TRAINER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
)
# RankCallback's side files, written after Trainer's own.
RANK_FILES = ("pedyra_state.safetensors", "pedyra_state.json")


def checkpoint_step(checkpoint: Path) -> int:
    """The step in the name of a checkpoint folder, `checkpoint-<step>`."""
    return int(checkpoint.name.rpartition("-")[2])


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest step first, whole or not."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=checkpoint_step)


def last_complete_checkpoint(run: Path, *, with_ranks: bool, processes: int = 1) -> tuple[Path, list[tuple[Path, str]]]:
    """The newest whole checkpoint, and the newer broken ones with what is wrong with each.

    Args:
        with_ranks: whether the run adapts ranks, and so needs RankCallback's side files.
        processes: how many train; each of several leaves the state of its random numbers.

    Raises:
        ValueError: the run has no whole checkpoint.
    """
    broken: list[tuple[Path, str]] = []
    for checkpoint in reversed(list_checkpoints(run)):
        flaw = find_flaw(checkpoint, with_ranks=with_ranks, processes=processes)
        if flaw is None:
            return checkpoint, broken
        broken.append((checkpoint, flaw))
    reason = f" ({broken[0][0].name}: {broken[0][1]})" if broken else ""
    raise ValueError(f"{run} holds no complete checkpoint{reason}; start the run anew with --overwrite")


def find_flaw(checkpoint: Path, *, with_ranks: bool, processes: int = 1) -> str | None:
    """What makes a checkpoint unusable, as "file: what is wrong", or None if it is whole."""
    each = [f"rng_state_{process}.pth" for process in range(processes)] if processes > 1 else []
    for name in (*TRAINER_FILES, *(RANK_FILES if with_ranks else ()), *each):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    for file in sorted(checkpoint.iterdir()):
        if not _is_whole(file):
            return f"{file.name} is cut short or damaged"
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int) or "log_history" not in state:
        return "trainer_state.json is damaged"
    return None


def is_half_written(checkpoint: Path, *, with_ranks: bool) -> bool:
    """Whether a file is cut short, or one of those written last is missing.

    What `training.save_only_model` leaves out is no damage, though nothing can be resumed from such a checkpoint.
    """
    last = (TRAINER_FILES[-1], *(RANK_FILES if with_ranks else ()))
    missing = any(not (checkpoint / name).is_file() for name in last)
    return missing or any(not _is_whole(file) for file in checkpoint.iterdir() if file.is_file())


def _is_whole(file: Path) -> bool:
    """By the file's own format: JSON parses, a zip of torch passes its checksums, safetensors fill their header."""
    if file.suffix == ".json":
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return False
    elif file.suffix in (".pt", ".pth"):
        try:
            with zipfile.ZipFile(file) as archive:
                return archive.testzip() is None
        except zipfile.BadZipFile:
            return False
    elif file.suffix == ".safetensors":
        try:
            with safe_open(file, "np"):
                return True
        except SafetensorError:
            return False
    return True

"""Trainer's checkpoint folders: written whole or not at all, which of a run's is whole, and a resume from the last."""

from __future__ import annotations

import functools
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedyra.lora.files import SUMS, check_sums, read_json, read_sums, sync_folder, write_sums

if TYPE_CHECKING:
    from transformers import Trainer  # at run time it is only handed on: a run folder is checked before torch is loaded

# What Trainer needs to resume, besides the state of the random numbers of each process.
TRAINER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
)
# RankCallback's side files.
RANK_FILES = ("pedyra_state.safetensors", "pedyra_state.json")
ASIDE = "_saving"
"""Folder of a run in which a checkpoint is written, and removed; what a kill left there is of no use."""


def save_whole(trainer: Trainer) -> None:
    """Have `trainer` write its checkpoints aside and rename them, so that none is ever seen half-written.

    Trainer itself writes into `checkpoint-<step>` file by file, removes older checkpoints, and calls `on_save` only
    then. From here on it writes into a folder aside; callbacks that have a `write_side_files(folder)` add theirs; the
    digests of all files are put beside them; one rename makes it `checkpoint-<step>`; only then older ones go.
    At every instant the newest checkpoint that has been finished is there whole.
    """
    original = trainer._save_checkpoint
    if getattr(original, "is_whole", False):
        return

    @functools.wraps(original)
    def save(model: Any, trial: Any = None) -> None:
        args, state, wait = trainer.args, trainer.state, trainer.accelerator.wait_for_everyone
        run = Path(trainer._get_output_dir(trial=trial))
        checkpoint, written = (folder / f"checkpoint-{state.global_step}" for folder in (run, run / ASIDE))
        if args.should_save:
            shutil.rmtree(run / ASIDE, ignore_errors=True)
        wait()  # for those who write there, too
        try:
            with replaced(trainer, "_get_output_dir", lambda trial: str(run / ASIDE)):
                with replaced(trainer, "_push_from_checkpoint", lambda folder: None):
                    original(model, trial)
            renamed = state.best_model_checkpoint == str(written)
            if renamed:  # in every process: each of them may load it
                state.best_model_checkpoint = str(checkpoint)
            if args.should_save:
                _complete(trainer, written if written.is_dir() else checkpoint, renamed)
            wait()  # for the random numbers of every process
            # The first process of a node may have a disk of its own, with nothing but its node's random numbers.
            for finishes in (args.should_save, args.local_process_index == 0):
                if finishes and written.is_dir():
                    write_sums(written, _files(written))
                    sync_folder(written)
                    _put(written, checkpoint)
                wait()
            if args.should_save:
                _drop_oldest(run, args.save_total_limit, checkpoint, state.best_model_checkpoint)
        finally:
            if args.should_save:
                shutil.rmtree(run / ASIDE, ignore_errors=True)
        if args.push_to_hub:
            trainer._push_from_checkpoint(str(checkpoint))

    save.is_whole = True  # type: ignore[attr-defined]
    trainer._save_checkpoint = save


def end_at_last_step(trainer: Trainer) -> None:
    """Have a training that is resumed at its last step take none more; inside an epoch Trainer by itself takes one."""
    original = trainer.get_batch_samples
    if getattr(original, "ends_at_last_step", False):
        return

    @functools.wraps(original)
    def batches(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step >= trainer.state.max_steps:
            return [], None
        return original(*args, **kwargs)

    batches.ends_at_last_step = True  # type: ignore[attr-defined]
    trainer.get_batch_samples = batches


def _complete(trainer: Trainer, written: Path, renamed: bool) -> None:
    """Add the side files, and Trainer's state anew, if its best checkpoint has got another name."""
    if renamed:
        trainer.state.save_to_json(str(written / "trainer_state.json"))
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "write_side_files"):
            callback.write_side_files(written)


def _put(written: Path, checkpoint: Path) -> None:
    """Rename, in the place of a checkpoint of the same step, which stays to be found until the new one can be."""
    older = checkpoint.with_name(checkpoint.name.replace("-", "-0"))  # int("08") is a step, too
    if checkpoint.exists():
        _remove(older, written.parent)
        checkpoint.rename(older)
    written.rename(checkpoint)
    _remove(older, written.parent)


def _drop_oldest(run: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """By Trainer's rule: the oldest go, but neither the newest nor the best."""
    if limit is None or limit <= 0:
        return
    kept = {newest.resolve(), *([] if best is None else [Path(best).resolve()])}
    found = sorted(list_checkpoints(run), key=lambda folder: folder.stat().st_mtime)
    others = [folder for folder in found if folder.resolve() not in kept]
    for folder in others[: max(0, len(found) - max(limit, len(kept)))]:
        _remove(folder, run / ASIDE)


def _remove(folder: Path, aside: Path) -> None:
    """At once, as far as anyone can see: half a checkpoint must not be found either."""
    if folder.is_dir():
        aside.mkdir(exist_ok=True)
        gone = folder.rename(aside / f"{folder.name}.old")
        shutil.rmtree(gone)


def _files(folder: Path) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in found if name != SUMS]


@contextmanager
def replaced(trainer: Trainer, name: str, method: Any) -> Iterator[None]:
    before = trainer.__dict__.get(name)
    setattr(trainer, name, method)
    try:
        yield
    finally:
        delattr(trainer, name)
        if before is not None:
            setattr(trainer, name, before)


def checkpoint_step(checkpoint: Path) -> int:
    """The step in the name of a checkpoint folder, `checkpoint-<step>`."""
    return int(checkpoint.name.rpartition("-")[2])


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest step first, whole or not."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    # A kill may have left two of a step: the one with a leading 0 was about to be replaced.
    return sorted(found, key=lambda path: (checkpoint_step(path), -len(path.name)))


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
    """What makes a checkpoint unusable, as "file: what is wrong", or None if it is whole.

    Every file must be there and be what SHA256SUMS says, and all be of the step in the folder's name.
    """
    each = [f"rng_state_{process}.pth" for process in range(processes)] if processes > 1 else ["rng_state.pth"]
    needed = (*TRAINER_FILES, *each, *(RANK_FILES if with_ranks else ()))
    try:
        for name in needed:
            if not (checkpoint / name).is_file():
                raise ValueError(f"{checkpoint / name} is missing")
        check_sums(checkpoint, {**dict.fromkeys(needed), **read_sums(checkpoint)})
        _check_steps(checkpoint, ("trainer_state.json", "global_step"), *([(RANK_FILES[1], "step")] * with_ranks))
    except ValueError as error:
        return str(error).removeprefix(f"{checkpoint}/")
    return None


def check_loaded(checkpoint: Path) -> None:
    """What Trainer has loaded without a check: whatever is not as it was saved is refused, what is missing is told.

    A checkpoint without digests was not saved with `save_whole`, and side files are for `checkpoint.restore` to judge.

    Raises:
        ValueError: a file is damaged or of another checkpoint; the message names an older checkpoint that is whole.
    """
    if not (checkpoint / SUMS).is_file():
        return
    try:
        listed = [name for name in read_sums(checkpoint) if name not in RANK_FILES]
        missing = [name for name in listed if not (checkpoint / name).is_file()]
        check_sums(checkpoint, [name for name in listed if name not in missing])
    except ValueError as error:
        older = [each for each in list_checkpoints(checkpoint.parent) if find_flaw(each, with_ranks=True) is None]
        repair = f"resume from {older[-1]}, which is whole" if older else "start anew"
        raise ValueError(f"{error}; {repair}") from None
    if missing:
        warnings.warn(f"{checkpoint / missing[0]} is missing: this is no exact resume", stacklevel=2)


def _check_steps(checkpoint: Path, *places: tuple[str, str]) -> None:
    for name, key in places:
        step = read_json(checkpoint / name, {key: int})[key]
        if step != checkpoint_step(checkpoint):
            raise ValueError(f"{checkpoint / name} is of step {step}, not {checkpoint_step(checkpoint)}")

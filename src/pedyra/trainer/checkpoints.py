"""Checkpoints appear whole or not at all: Trainer's own files, the side files of callbacks, and digests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy, rotate_checkpoints

from pedyra.lora.files import SUMS, remove, sync_folder, write_sums
from pedyra.trainer.changes import attribute, put_around
from pedyra.trainer.checkpoint_folder import ASIDE


def save_whole(trainer: Trainer) -> None:
    """Have `trainer` write its checkpoints aside and rename them, so that none is ever seen half-written.

    It writes into a folder aside; callbacks that have a `write_side_files(folder)` add theirs; the digests of all files
    are put beside them; one rename makes it `checkpoint-<step>`; only then older ones go. Where the last step of an
    epoch is saved and the epoch evaluated, the evaluation comes first: a resume would lack it, and its random numbers.
    """
    put_around(trainer, "_save_checkpoint", _save, trainer)
    put_around(trainer, "_maybe_log_save_evaluate", _save_after_evaluation, trainer)


_WAITED = "_saves_after_evaluation"
"""A Trainer keeps under this name the step whose checkpoint has waited for the end of its epoch."""


def _save_after_evaluation(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    control, state = trainer.control, trainer.state
    over = trainer.args.eval_strategy == IntervalStrategy.EPOCH and float(state.epoch or 0.5).is_integer()
    has_waited = vars(trainer).pop(_WAITED, None) == state.global_step
    if not over or not control.should_save or control.should_evaluate or has_waited:
        return original(*args, **kwargs)
    vars(trainer)[_WAITED], control.should_save = state.global_step, False
    result = original(*args, **kwargs)
    control.should_save = True  # the epoch ends now, where Trainer evaluates before it saves
    return result


def _save(original: Callable[..., Any], trainer: Trainer, model: Any, trial: Any = None) -> None:
    args, state, wait = trainer.args, trainer.state, trainer.accelerator.wait_for_everyone
    run = Path(trainer._get_output_dir(trial=trial))
    checkpoint, draft = (folder / f"checkpoint-{state.global_step}" for folder in (run, run / ASIDE))
    if args.should_save:
        remove(run / ASIDE)  # a link, too, which would lead out of the run folder
    wait()  # other processes write there, too
    try:
        with attribute(trainer, "_get_output_dir", lambda trial: str(run / ASIDE)):
            with attribute(trainer, "_push_from_checkpoint", lambda folder: None):
                original(model, trial)
        is_best = state.best_model_checkpoint == str(draft)
        if is_best:  # every process may load it
            state.best_model_checkpoint = str(checkpoint)
        if args.should_save:
            if is_best:  # under its new name
                state.save_to_json(str(draft / "trainer_state.json"))
            for each in trainer.callback_handler.callbacks:
                if callable(write := getattr(each, "write_side_files", None)):
                    write(draft)
        wait()  # every process writes its random numbers
        # The first process of a node may have a disk of its own, with nothing but its node's random numbers.
        for finishes in (args.should_save, args.local_process_index == 0):
            if finishes and draft.is_dir():
                files = [path for path in draft.rglob("*") if path.is_file() and path != draft / SUMS]
                write_sums(draft, [path.relative_to(draft).as_posix() for path in files])
                sync_folder(draft)
                _put(draft, checkpoint)
            wait()
        if args.should_save:
            rotate_checkpoints(str(run), args.save_total_limit, state.best_model_checkpoint, use_mtime=True)
    finally:
        if args.should_save:
            shutil.rmtree(run / ASIDE, ignore_errors=True)
    if args.push_to_hub:
        trainer._push_from_checkpoint(str(checkpoint))


def _put(draft: Path, checkpoint: Path) -> None:
    """Rename, in the place of a checkpoint of the same step, which stays to be found until the new one can be."""
    older = checkpoint.with_name(checkpoint.name.replace("-", "-0"))  # int("08") is a step, too
    if checkpoint.exists():
        _remove(older, draft.parent)
        checkpoint.rename(older)
    draft.rename(checkpoint)
    _remove(older, draft.parent)


def _remove(folder: Path, aside: Path) -> None:
    """Remove it at once, as far as anyone can see: half a checkpoint must not be found either."""
    if folder.is_dir():
        aside.mkdir(exist_ok=True)
        remove(folder.rename(aside / f"{folder.name}.old"))

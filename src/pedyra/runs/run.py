"""One training run: recipe -> run folder."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from transformers import Trainer, TrainerCallback

from pedyra.files import append_row, write_file, write_folder
from pedyra.methods.registry import get_method
from pedyra.recipe import Recipe
from pedyra.runs.environment import describe_environment, peak_memory_bytes, recorded
from pedyra.runs.interrupt import StopOnInterrupt
from pedyra.runs.last_checkpoint import checkpoint_step, is_half_written, last_complete_checkpoint, list_checkpoints
from pedyra.runs.metrics_log import MetricsLog
from pedyra.runs.plan import Plan, lora_layers, make_plan
from pedyra.runs.progress import TrainingProgress
from pedyra.runs.run_folder import RunFolder
from pedyra.runs.setup import Setup, set_up, trainable_parameters


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to."""

    recipe: Recipe
    folder: RunFolder
    step: int
    total_steps: int
    layers: list[dict[str, Any]]
    """Per adapted layer: layer (its name), rank, parameters (of its factors)."""
    final: dict[str, Any] | None
    """The last line of metrics.jsonl; None for a run that was interrupted."""

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the run; its last checkpoint is of `step`."""
        return self.final is None

    @property
    def diverged(self) -> bool:
        """Whether the loss on the held-out rows is no finite number."""
        return self.final is not None and not math.isfinite(self.final["eval_loss"])

    def rows(self) -> list[dict[str, Any]]:
        """The result as one row, then one row per layer."""
        shown = ("metric", "value", "eval_loss", "trainable_parameters", "seconds", "peak_memory_bytes")
        result = {key: (self.final or {}).get(key) for key in shown}
        recipe = {"method": self.recipe.method, "task": self.recipe.name, "seed": self.recipe.seed}
        return [{"run": str(self.folder.path), **recipe, "steps": self.step, **result}, *self.layers]


def plan_run(recipe: Recipe, *, overwrite: bool = False, resume: bool = False) -> Plan:
    """Check everything `train_run` would check, and return the plan; nothing is trained or written.

    Raises:
        ValueError: whatever would stop the run.
    """
    _check_one_process()
    folder = RunFolder(Path(recipe.output_dir))
    _check_folder(folder, recipe, overwrite=overwrite, resume=resume)
    return make_plan(set_up(recipe))


def train_run(recipe: Recipe, *, overwrite: bool = False, resume: bool = False, console: Console) -> RunResult:
    """Train a recipe into its run folder, save the adapter and judge it on the held-out rows.

    Everything is checked first; an older run is removed only once this one has taken a step. Progress goes to
    `console`.

    Args:
        overwrite: replace the run in the output folder.
        resume: continue it from its last whole checkpoint.

    Raises:
        ValueError: a mistake in the recipe, or an output folder that must not be written.
        OSError: the disk is full (ENOSPC); the message names the last whole checkpoint.
    """
    _check_one_process()
    folder = RunFolder(Path(recipe.output_dir))
    folder.repair()
    _check_folder(folder, recipe, overwrite=overwrite, resume=resume)
    setup = set_up(recipe, record_to=folder.ranks)
    plan = make_plan(setup)
    with folder.held():
        checkpoint = _check_folder(folder, recipe, overwrite=overwrite, resume=resume)  # others may have been here
        if resume:
            _check_data(folder, setup)
        try:
            if overwrite:
                folder.set_aside()
            if not resume:
                write_file(folder.recipe, recipe.to_yaml())
            return _train(setup, plan, folder, checkpoint, console)
        except BaseException as error:
            is_back = folder.bring_back()  # if the new one has not come as far as a step
            if _is_disk_full(error):
                raise OSError(errno.ENOSPC, _disk_full_message(folder, is_back)) from error
            raise


class _Replacing(TrainerCallback):
    """The run that this one replaces is gone once this one has taken a step."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.folder.drop_aside()


def _check_one_process() -> None:
    """Several processes would write one run folder."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise ValueError(
            f"WORLD_SIZE is {size}: pedyra train runs in one process; start it without torchrun or accelerate launch, "
            f"or use RankCallback in a script of your own, which works under both"
        )


def _check_folder(folder: RunFolder, recipe: Recipe, *, overwrite: bool, resume: bool) -> Path | None:
    """The checkpoint to resume from, None without `resume`; ValueError where the run must not start."""
    folder.check(overwrite=overwrite, resume=resume)
    if not resume:
        return None
    before, now = (_flat(yaml.safe_load(text)) for text in (folder.recipe.read_text("utf-8"), recipe.to_yaml()))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ValueError(
            f"--resume: {key} was {before.get(key)!r} and is now {now.get(key)!r}{more}; "
            f"continue with the run's own recipe, {folder.recipe}, or start anew with --overwrite"
        )
    if not get_method(recipe.method).resumable:
        raise ValueError(f"--resume: method {recipe.method} cannot continue from a checkpoint; --overwrite starts anew")
    checkpoint, _ = _last_complete(folder)
    return checkpoint


def _check_data(folder: RunFolder, setup: Setup) -> None:
    """What the data section names may have changed behind it."""
    if recorded(folder, "data_sha256") not in (None, setup.task.digest()):
        raise ValueError(
            f"--resume: the rows of {setup.recipe.data.source}, or their tokens, are not those that the run in "
            f"{folder.path} began with; bring them back, or start anew with --overwrite"
        )


def _last_complete(folder: RunFolder) -> tuple[Path, list[tuple[Path, str]]]:
    return last_complete_checkpoint(folder.path, with_ranks=folder.ranks.is_file())


def _train(setup: Setup, plan: Plan, folder: RunFolder, checkpoint: Path | None, console: Console) -> RunResult:
    start_step = checkpoint_step(checkpoint) if checkpoint else 0
    if checkpoint is not None:
        for broken, flaw in _last_complete(folder)[1]:  # Trainer would count them as the newest
            console.print(f"removing {broken}, which is not whole: {flaw}", soft_wrap=True)
            shutil.rmtree(broken)
        console.print(f"continuing from {checkpoint}", soft_wrap=True)
    log = MetricsLog(folder.metrics, start_step)
    progress = TrainingProgress(console, setup.task.metric, sum(layer["rank"] for layer in plan.layers), setup.ranks)
    stop = StopOnInterrupt()
    # The method's first: what it adds to a log is then seen by the others.
    callbacks = [*setup.adaptation.callbacks, log, progress, stop, _Replacing(folder)]
    trainer = setup.trainer(str(folder.path), callbacks)
    if start_step >= plan.total_steps:
        _leave_nothing_to_train(trainer, plan.total_steps)
    environment = describe_environment(setup.recipe.seed, trainer.args.device)
    environment |= {"resumed_from": start_step or None, "data_sha256": setup.task.digest()}
    environment["train_sha256"] = setup.task.digest(train_only=True)
    write_file(folder.environment, json.dumps(environment, indent=2) + "\n")
    with stop, progress:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step = trainer.state.global_step
    final = None
    if step >= plan.total_steps or not stop.requested:
        final = _finish(setup, folder, trainer, log)
    return RunResult(
        recipe=setup.recipe,
        folder=folder,
        step=step,
        total_steps=plan.total_steps,
        layers=lora_layers(setup.model),
        final=final,
    )


def _leave_nothing_to_train(trainer: Trainer, total_steps: int) -> None:
    """Make a resume from the very last step only restore the run.

    Inside an epoch Trainer would take one step too many; with epochs of one batch, the last step ends an epoch.
    """
    dataset: Any = trainer.train_dataset
    trainer.train_dataset = dataset.select(range(1))
    trainer.args.max_steps = total_steps


def _finish(setup: Setup, folder: RunFolder, trainer: Trainer, log: MetricsLog) -> dict[str, Any]:
    """Save the adapter, judge it on the held-out rows, and close metrics.jsonl with the final line."""
    trained = trainable_parameters(setup.model)
    if setup.adaptation.finish is not None:
        setup.adaptation.finish()
        trainer.state.log_history.clear()  # those evaluations were of the model before
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    write_folder(folder.adapter, lambda part: setup.model.save_pretrained(str(part)))
    evaluation = _final_evaluation(trainer, log if best else None)
    final = {
        "step": trainer.state.global_step,
        "final": True,
        **({} if best is None else {"best_step": checkpoint_step(Path(best))}),
        "seconds": round(log.seconds, 3),
        "train_steps_per_second": round(log.steps_per_second, 4),
        "peak_memory_bytes": peak_memory_bytes(trainer.args.device),
        "trainable_parameters": trained,
        "metric": setup.task.metric,
        "value": evaluation[f"eval_{setup.task.metric}"],
        "eval_loss": evaluation["eval_loss"],
    }
    append_row(folder.metrics, final)
    return final


def _final_evaluation(trainer: Trainer, silent: MetricsLog | None) -> dict[str, float]:
    """Metrics of the adapter as it was saved: those of the last step if it was evaluated, else a new evaluation.

    `silent` is the log of a run whose best adapter is judged, which it would take for that of the last step.
    """
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if evaluations and evaluations[-1]["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return evaluations[-1]
    if silent is not None:
        trainer.remove_callback(silent)
    return trainer.evaluate()


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"lora": {"r": 8}} -> {"lora.r": 8}."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# How safetensors, and torch's writer of zip archives, tell that a write failed; neither raises OSError.
_FAILED_WRITES = ("No space left on device", "PytorchStreamWriter", "inline_container", "iostream error")


def _is_disk_full(error: BaseException) -> bool:
    """Whether a write that found no space is at the bottom of it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if any(sign in str(error) for sign in _FAILED_WRITES):
        return True
    below = error.__cause__ or error.__context__
    return below is not None and _is_disk_full(below)


def _disk_full_message(folder: RunFolder, is_back: bool) -> str:
    """What to do now; the checkpoint that was being written is of no use and is removed.

    `is_back`: what is in the folder is the run that this one was to replace.
    """
    if is_back:
        return f"disk full while writing {folder.path}, before the first step; the run that was there is kept"
    kept = list_checkpoints(folder.path)
    if kept and is_half_written(kept[-1], with_ranks=folder.ranks.is_file()):
        shutil.rmtree(kept.pop())
    if not kept:
        return f"disk full while writing {folder.path}, before the first checkpoint; free space and train again"
    try:
        whole = _last_complete(folder)[0].name
    except ValueError:
        return (
            f"disk full while writing {folder.path}; {kept[-1].name} holds the adapter, but not what a resume needs: "
            f"free space, then train again with --overwrite"
        )
    return (
        f"disk full while writing {folder.path}; {whole} is whole: free space, then continue with "
        f"pedyra train {folder.recipe} --resume"
    )

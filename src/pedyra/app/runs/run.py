"""One training run: recipe -> run folder."""

from __future__ import annotations

import errno
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import Trainer, TrainerCallback

from pedyra.allocate.checkpoint_folder import checkpoint_step, last_complete_checkpoint
from pedyra.app.recipe import Recipe
from pedyra.app.runs.disk_full import is_disk_full, what_now
from pedyra.app.runs.environment import describe_environment, memory_bytes, peak_memory_bytes, recorded
from pedyra.app.runs.interrupt import StopOnInterrupt
from pedyra.app.runs.metrics_log import MetricsLog
from pedyra.app.runs.plan import Plan, lora_layers, make_plan
from pedyra.app.runs.processes import count_processes, is_first, wait_for_all
from pedyra.app.runs.progress import TrainingProgress
from pedyra.app.runs.run_folder import RunFolder
from pedyra.app.runs.setup import Setup, set_up, trainable_parameters
from pedyra.app.yaml_file import first_difference, read_settings
from pedyra.lora.files import append_row, remove, write_file, write_folder
from pedyra.methods.registry import get_method


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
    size: str | None = None
    """What a fit found of the adapter's size, in words."""

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
    folder = RunFolder(Path(recipe.output_dir))
    if is_first():
        folder.repair()
    checkpoint = _check_folder(folder, recipe, overwrite=overwrite, resume=resume)
    setup = set_up(recipe, record_to=folder.ranks)
    plan = make_plan(setup)
    if resume:
        _check_data(folder, setup)
    wait_for_all()  # nobody looks at the folder any more to see whether the run may start
    if not is_first():
        wait_for_all()
        return _train(setup, plan, folder, checkpoint, console)
    with folder.held():
        checkpoint = _check_folder(folder, recipe, overwrite=overwrite, resume=resume)  # others may have been here
        try:
            if overwrite:
                folder.set_aside()
            if not resume:
                write_file(folder.recipe, recipe.to_yaml())
            _remove_broken(folder, checkpoint, console)
            wait_for_all()
            return _train(setup, plan, folder, checkpoint, console)
        except BaseException as error:
            is_back = folder.bring_back()  # if the new one has not come as far as a step
            if is_disk_full(error):
                raise OSError(errno.ENOSPC, what_now(folder, is_back=is_back)) from error
            raise


class _Replacing(TrainerCallback):
    """The run that this one replaces is gone once this one has taken a step."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.folder.drop_aside()


def _check_folder(folder: RunFolder, recipe: Recipe, *, overwrite: bool, resume: bool) -> Path | None:
    """The checkpoint to resume from, None without `resume`; ValueError where the run must not start."""
    folder.check(overwrite=overwrite, resume=resume)
    if not resume:
        return None
    before = read_settings(folder.recipe, [], what="recipe", starts_with="model")
    changed = first_difference(before, recipe.model_dump(mode="json"))
    if changed:
        raise ValueError(
            f"--resume: {changed}; continue with the run's own recipe, {folder.recipe}, or start anew with --overwrite"
        )
    if not get_method(recipe.method).resumable:
        raise ValueError(f"--resume: method {recipe.method} cannot continue from a checkpoint; --overwrite starts anew")
    processes = recorded(folder, "processes") or 1
    if processes != count_processes():
        raise ValueError(
            f"--resume: the run in {folder.path} was trained by {processes} process(es) and this would be "
            f"{count_processes()}, with other batches; start as many, or start anew with --overwrite"
        )
    return _last_complete(folder)[0]


def _check_data(folder: RunFolder, setup: Setup) -> None:
    """What the data section names may have changed behind it."""
    if recorded(folder, "data_sha256") not in (None, setup.task.digest()):
        raise ValueError(
            f"--resume: the rows of {setup.recipe.data.source}, or their tokens, are not those that the run in "
            f"{folder.path} began with; bring them back, or start anew with --overwrite"
        )


def _last_complete(folder: RunFolder) -> tuple[Path, list[tuple[Path, str]]]:
    return last_complete_checkpoint(folder.path, with_ranks=folder.ranks.is_file(), processes=count_processes())


def _remove_broken(folder: RunFolder, checkpoint: Path | None, console: Console) -> None:
    """Remove what is newer than the checkpoint to resume from, which Trainer would count as the newest."""
    if checkpoint is None:
        return
    for broken, flaw in _last_complete(folder)[1]:
        console.print(f"removing {broken}, which is not whole: {flaw}", soft_wrap=True)
        remove(broken)
    console.print(f"continuing from {checkpoint}", soft_wrap=True)


def _train(setup: Setup, plan: Plan, folder: RunFolder, checkpoint: Path | None, console: Console) -> RunResult:
    """In every process; what writes and draws is the first one's."""
    start_step = checkpoint_step(checkpoint) if checkpoint else 0
    log = MetricsLog(folder.metrics, start_step, writes=is_first())
    progress = TrainingProgress(console, setup.task.metric, sum(layer["rank"] for layer in plan.layers), setup.ranks)
    stop = StopOnInterrupt()
    # The method's first: what it adds to a log is then seen by the others.
    callbacks = [*setup.callbacks, log, *([progress, _Replacing(folder)] if is_first() else []), stop]
    trainer = setup.trainer(str(folder.path), callbacks)
    if start_step >= plan.total_steps:
        _leave_nothing_to_train(trainer, plan.total_steps)
    if is_first():
        environment = describe_environment(setup.recipe.seed, trainer.args.device)
        environment |= {"processes": count_processes(), "resumed_from": start_step or None}
        environment |= {"data_sha256": setup.task.digest(), "train_sha256": setup.task.digest(train_only=True)}
        environment |= {"memory_before_bytes": memory_bytes(trainer.args.device)}
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
        size=_size(setup),
    )


def _size(setup: Setup) -> str | None:
    """In words, what a fit found last; None where none was."""
    history = [] if setup.ranks is None or setup.ranks.allocator is None else setup.ranks.allocator.history
    return history[-1].get("fit", {}).get("words") if history else None


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
    if is_first():
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
        "total_parameters": sum(parameter.numel() for parameter in setup.model.parameters()),
        "metric": setup.task.metric,
        "value": evaluation[f"eval_{setup.task.metric}"],
        "eval_loss": evaluation["eval_loss"],
    }
    if is_first():
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

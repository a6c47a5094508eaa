"""`pedyra train`: a recipe is set up and trained into its run folder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from rich.console import Console
from transformers import Trainer, TrainerCallback

from pedyra.app.interrupts import on_interrupt
from pedyra.app.recipe import Recipe
from pedyra.app.runs.arguments import asks_for_fsdp
from pedyra.app.runs.callbacks import MetricsLog, StopOnInterrupt, TrainingBar, TrainingProgress
from pedyra.app.runs.environment import describe_environment, memory_bytes, peak_memory_bytes
from pedyra.app.runs.processes import count_processes, from_first, is_first
from pedyra.app.runs.resume import how_to_go_on, last_checkpoint, rows_per_step
from pedyra.app.runs.run_folder import RunFolder
from pedyra.app.runs.setup import Setup, judge, layer_rows, ready_to_fit, set_up
from pedyra.errors import UserError, as_user_error
from pedyra.fitting.modes import use_averaged
from pedyra.fitting.result import Fit
from pedyra.lora.attach import detach
from pedyra.lora.card import CARD, adapter_card, shown_name, shown_ranks
from pedyra.lora.files import append_row, remove, write_file
from pedyra.lora.folder import save_adapter
from pedyra.lora.inspection import inspect_adapter
from pedyra.lora.layer import adapted_layers
from pedyra.methods.registry import get_method
from pedyra.trainer.adapt import MethodTraining
from pedyra.trainer.checkpoint_folder import checkpoint_step
from pedyra.trainer.engines import reshard
from pedyra.trainer.fit import fit_trainer


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of a run."""

    recipe: Recipe
    folder: RunFolder
    step: int
    total_steps: int
    layers: list[dict[str, Any]]  # of `layer_rows`
    start: list[dict[str, Any]]  # the same before training
    final: dict[str, Any] | None  # the last line of metrics.jsonl; None for a run that was interrupted
    fit: Fit | None = None

    @property
    def interrupted(self) -> bool:
        return self.final is None

    @property
    def diverged(self) -> bool:
        return self.final is not None and not math.isfinite(self.final["eval_loss"])

    @property
    def goes_on(self) -> str:
        return how_to_go_on(self.recipe, self.folder)

    @property
    def awaits_fit(self) -> bool:
        """Whether `pedyra fit` takes what was trained, and the run has not fitted it itself."""
        is_lora = get_method(self.recipe.method.name).peft_type == "LORA"
        return is_lora and bool(self.layers) and self.fit is None and not self.interrupted and not self.diverged

    def rows(self) -> list[dict[str, Any]]:
        """Return the result as one row, then one row per layer."""
        keys = ("metric", "value", "eval_loss", "trainable_parameters", "seconds", "peak_memory_bytes")
        result = {key: (self.final or {}).get(key) for key in keys}
        recipe = {"method": self.recipe.method.name, "task": self.recipe.name, "seed": self.recipe.seed}
        return [{"run": str(self.folder.path), **recipe, "steps": self.step, **result}, *self.layers]


def train_run(recipe: Recipe, *, overwrite: bool = False, resume: bool = False, console: Console) -> RunResult:
    """Train a recipe into its run folder, save the adapter and evaluate it on the held-out rows. A run that ends before
    it has logged or saved anything leaves nothing."""
    folder = RunFolder(Path(recipe.output_dir))
    if not is_first():
        return _train(set_up(recipe), folder, from_first(None), console)  # which has prepared the folder by then
    folder.check(overwrite=overwrite, resume=resume)
    with folder.lock():
        checkpoint, remains = last_checkpoint(folder, recipe) if resume else (None, [])
        setup = set_up(recipe, record_to=folder.ranks)
        if resume:
            if folder.recorded("data_sha256") not in (None, setup.task.digest()):
                raise UserError(
                    f"--resume: the rows of {recipe.data.source}, or their tokens, are not those that the run in "
                    f"{folder.path} began with; bring them back, or start anew with --overwrite"
                )
            for damaged, flaw in remains:  # or Trainer would take it for the newest
                console.print(f"removing {damaged}, which is not whole: {flaw}", soft_wrap=True)
                remove(damaged)
            console.print(f"continuing from {checkpoint}", soft_wrap=True)
            write_file(folder.recipe, recipe.to_yaml())  # the number of processes may have changed
        try:
            if not resume:
                folder.begin(recipe.to_yaml())
            return _train(setup, folder, from_first(checkpoint), console)
        finally:
            folder.remove_empty_run()


def _train(setup: Setup, folder: RunFolder, checkpoint: Path | None, console: Console) -> RunResult:
    """Train in every process; the first one writes and prints."""
    start_step = checkpoint_step(checkpoint) if checkpoint else 0
    log = MetricsLog(folder.metrics, start_step, writes=is_first())
    progress = TrainingProgress(console, setup.task.metric)
    stop = StopOnInterrupt()
    callbacks: list[TrainerCallback] = [log, stop]
    if is_first():
        callbacks += [progress, *([TrainingBar(progress)] if console.is_terminal else [])]
    trainer, progress.handle = setup.training(str(folder.path), callbacks)
    start = layer_rows(setup.model)
    progress.total_rank = sum(layer["rank"] for layer in start)
    if asks_for_fsdp(setup.recipe) and not trainer.is_fsdp_enabled:
        where = "several processes on a CPU, where accelerate cuts nothing" if count_processes() > 1 else "one process"
        console.print(f"FSDP is left out in {where}", soft_wrap=True)
    if is_first():
        device = trainer.args.device
        environment = describe_environment(setup.recipe.seed, device) | {
            "processes": count_processes(),
            "fsdp2": trainer.is_fsdp_enabled,
            "rows_per_step": rows_per_step(trainer.args),
            "resumed_from": start_step or None,
            "data_sha256": setup.task.digest(),
            "train_sha256": setup.task.digest(train_only=True),
            "classes": setup.task.classes,
            "memory_before_bytes": memory_bytes(device),
        }
        write_file(folder.environment, json.dumps(environment, indent=2) + "\n")
    what = f"--resume: a file in {checkpoint} holds more than tensors and numbers, which is not run"
    repair = "remove that checkpoint, or start anew with --overwrite"
    with on_interrupt(stop.request), as_user_error(what, UnpicklingError, reason=lambda error: repair):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step, total_steps = trainer.state.global_step, trainer.state.max_steps
    is_over = step >= total_steps or not stop.has_request
    final = _finish(setup, folder, trainer, log, progress.handle) if is_over else None
    layers = layer_rows(setup.model)
    result = RunResult(
        recipe=setup.recipe, folder=folder, step=step, total_steps=total_steps, layers=layers, start=start, final=final
    )
    if setup.recipe.fit is None or final is None or result.diverged:
        return result
    return replace(result, fit=_fit(setup.recipe, folder, trainer, console))


def _fit(recipe: Recipe, folder: RunFolder, trainer: Trainer, console: Console) -> Fit:
    """Fit the adapter, and write the smaller one beside it."""
    model: Any = trainer.model
    ready_to_fit(recipe, trainer)
    if adapted_layers(model):  # a start that took a part of the weight then becomes a part of the factors
        detach(model)
    trainer.args.disable_tqdm = not console.is_terminal  # a fit has its own progress bar
    assert recipe.fit is not None
    try:
        result = fit_trainer(trainer, recipe.fit)
    except UserError as error:
        raise UserError(f"the run is whole, but it could not be fitted: {error}") from error
    result.save(folder.path / "fit", overwrite=True)
    return result


def _finish(
    setup: Setup, folder: RunFolder, trainer: Trainer, log: MetricsLog, handle: MethodTraining | None
) -> dict[str, Any]:
    """Save the adapter, evaluate it on the held-out rows, and write the final line of metrics.jsonl."""
    num_trainable = setup.model.get_nb_trainable_parameters()[0] if handle is None else handle.trained_parameters
    reshard(setup.model)
    # A schedule-free optimizer has two sets of weights; the averaged one is evaluated.
    use_averaged(trainer.optimizer)
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None

    if is_first():
        save_adapter(setup.model, folder.adapter)
    # The final line has this evaluation, which may be of an earlier step; trackers have closed their files.
    trainer.log = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
    metrics = judge(trainer)
    final = {
        "step": trainer.state.global_step,
        "final": True,
        **({} if best is None else {"best_step": checkpoint_step(Path(best))}),
        "seconds": round(log.seconds + (0.0 if handle is None else handle.preparation_seconds), 3),
        "peak_memory_bytes": peak_memory_bytes(trainer.args.device),
        "trainable_parameters": num_trainable,
        "total_parameters": sum(parameter.numel() for parameter in setup.model.parameters()),
        "metric": setup.task.metric,
        "value": metrics[setup.task.metric],
        "eval_loss": metrics.pop("loss"),
        "metrics": metrics,
    }
    if is_first():
        write_file(folder.adapter / CARD, _card(setup, folder, final))
        append_row(folder.metrics, final)
    return final


def _card(setup: Setup, folder: RunFolder, final: dict[str, Any]) -> str:
    """Write the model card of the saved adapter. PEFT's own may name a local path as the base, which the Hub
    refuses."""
    recipe, layers = setup.recipe, inspect_adapter(folder.adapter)[:-1] if layer_rows(setup.model) else []
    base, quantised = recipe.model.name, recipe.model.quantization
    rows = {
        "method": f"`{recipe.method.name}`: {get_method(recipe.method.name).summary}",
        "base model": shown_name(base) + ("" if quantised == "none" else f", in {quantised}"),
        "data": f"{shown_name(recipe.data.source)} ({recipe.data.kind})",
        "adapted": shown_ranks([layer["rank"] for layer in layers if layer["rank"] is not None]),
        "parameters": f"{sum(layer['parameters'] for layer in layers):,} in the LoRA factors" if layers else "",
        "training": f"{final['step']:,} steps, seed {recipe.seed}",
        "held-out rows": f"{final['metric']} {final['value']:.4f}, loss {final['eval_loss']:.4f}",
    }
    return adapter_card(recipe.name, rows, base=base, dataset=recipe.data.source, metrics=[final["metric"]])

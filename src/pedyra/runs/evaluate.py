"""The saved adapter of a run, judged again on the run's held-out rows."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel

from pedyra.lora.inspection import find_adapter, read_json, read_tensors
from pedyra.methods.method import Adaptation
from pedyra.methods.registry import get_method
from pedyra.models import load_model, load_tokenizer
from pedyra.recipe import load_recipe
from pedyra.runs.environment import recorded
from pedyra.runs.run_folder import RunFolder
from pedyra.runs.setup import Setup
from pedyra.tasks import load_task

# What Trainer adds to every evaluation that says nothing about the model.
_TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def evaluate_run(run: Path) -> dict[str, float]:
    """Metric name -> value: those of the task, and the loss. The adapter is loaded as any PEFT user would.

    Raises:
        ValueError: `run` is no run folder, or holds no saved adapter yet.
    """
    folder = RunFolder(run)
    if not folder.holds_run():
        raise ValueError(f"{run} is no run folder (it has no recipe.yaml); give the output_dir of a training run")
    recipe = load_recipe(folder.recipe)
    recipe = get_method(recipe.method).resolve(recipe)
    if not folder.is_finished() and not folder.adapter.is_dir():
        raise ValueError(f"the run in {run} is not finished; continue it with pedyra train {folder.recipe} --resume")
    adapter = find_adapter(run)
    if "peft_type" not in read_json(adapter / "adapter_config.json"):  # a damaged file is told by its name
        raise ValueError(f"{adapter / 'adapter_config.json'} is damaged: it names no peft_type")
    read_tensors(adapter / "adapter_model.safetensors")
    tokenizer = load_tokenizer(recipe.model)
    task = load_task(recipe.data, tokenizer, recipe.seed)
    if recorded(folder, "train_sha256") not in (None, task.digest(train_only=True)):
        raise ValueError(
            f"the training rows of {recipe.data.source}, or their tokens, are not those of {run}: what is held out of "
            f"them may have been trained on, and labels may have other numbers; bring them back"
        )
    base = load_model(recipe.model, recipe.data.kind, task.num_labels, tokenizer, recipe.seed)
    # PEFT's AdaLoRA looks for its trainable adapter in any forward with labels, and adds its penalty to the loss.
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    for config in model.peft_config.values():
        if hasattr(config, "orth_reg_weight"):
            config.orth_reg_weight = 0.0  # type: ignore[attr-defined]
    setup = Setup(recipe=recipe, tokenizer=tokenizer, task=task, adaptation=Adaptation(model=model))
    with TemporaryDirectory() as scratch:
        trainer = setup.trainer(scratch)
        metrics = _named(trainer.evaluate())
        for name, extra in task.extra.items():
            trainer.compute_metrics = extra.compute_metrics
            of_extra: Any = extra.eval
            metrics |= _named(trainer.evaluate(of_extra), f"{name}_")
    return metrics


def _named(evaluation: dict[str, float], prefix: str = "") -> dict[str, float]:
    """What Trainer found, without its own prefix and what tells nothing about the model."""
    names = {key: key.removeprefix("eval_") for key in evaluation if key.startswith("eval_")}
    return {f"{prefix}{name}": evaluation[key] for key, name in names.items() if name not in _TIMINGS}

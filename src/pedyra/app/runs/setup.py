"""A recipe becomes everything a Trainer takes: data, the model as the method adapts it, and arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pedyra.allocate.contract import Method
from pedyra.app.models.base import load_model, load_tokenizer, positions
from pedyra.app.models.lora import check_names, check_random_weights, lora_config
from pedyra.app.recipe import Recipe
from pedyra.app.recipe_sections import GENERATED, LOWER_IS_BETTER
from pedyra.app.runs.arguments import asks_for_fsdp, training_arguments
from pedyra.app.runs.processes import count_processes, is_launched
from pedyra.app.tasks.task import Task, load_task
from pedyra.app.tasks.test_sets import load_test_sets
from pedyra.errors import REFUSALS, UserError, as_user_error
from pedyra.fitting.calibration import lora_layers
from pedyra.lora.layer import adapted_layers
from pedyra.methods.registry import get_method
from pedyra.trainer.adapt import MethodTraining, adapt
from pedyra.trainer.changes import end_at_last_step
from pedyra.trainer.checkpoints import save_whole
from pedyra.trainer.engines import check_engine, keep_whole
from pedyra.trainer.rows import least_held_out


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run before its training or its plan. Training changes the model alone."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    task: Task
    model: PeftModel
    method: Method | None = None  # None where PEFT's config is the whole method
    record_to: Path | None = None  # the ranks.jsonl

    def training(
        self, output_dir: str, callbacks: Sequence[TrainerCallback] = (), **overrides: Any
    ) -> tuple[Trainer, MethodTraining | None]:
        """Return a Trainer of this run and its method, and the handle of `adapt`, None for PEFT's own methods."""
        trainer = self.trainer(output_dir, callbacks, **overrides)
        if self.method is not None:
            return trainer, adapt(trainer, self.method, record_to=self.record_to)
        # As in `adapt`: the first process saves a checkpoint that any number of processes can load.
        keep_whole(trainer, self.model, adapted_layers(self.model))
        for change in (save_whole, end_at_last_step):
            change(trainer)
        return trainer, None

    def trainer(self, output_dir: str, callbacks: Sequence[TrainerCallback] = (), **overrides: Any) -> Trainer:
        """Return a Trainer that evaluates this run's model, without progress bars, by the recipe and `overrides`."""
        overrides |= {"output_dir": output_dir, "disable_tqdm": True, "label_names": list(self.task.targets)}
        training = self.recipe.training
        if training.get("load_best_model_at_end") or training.get("save_strategy") == "best":
            metric = training.get("metric_for_best_model") or self.task.metric
            # transformers knows this of losses alone.
            lower = metric.endswith("loss") or metric.removeprefix("eval_") in LOWER_IS_BETTER
            best_model = {"metric_for_best_model": metric, "greater_is_better": not lower}
            overrides |= {name: value for name, value in best_model.items() if training.get(name) is None}
        args = training_arguments(self.recipe, **overrides)
        with as_user_error("training", *REFUSALS):
            trainer = _Trainer(
                self.model,
                args,
                processing_class=self.tokenizer,
                callbacks=[*callbacks],
                **self.task.trainer_arguments(),
            )
        check_engine(trainer)
        if self.recipe.data.kind != "causal_lm":
            # Trainer takes a forward with **kwargs for one that divides its loss by the rows of all micro-batches. A
            # classifier's loss is the mean of one micro-batch, so that their sum would be too large.
            trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(PrinterCallback)
        return trainer


class _Trainer(Trainer):
    """Evaluates all held-out rows in their order, whatever `training` says of the training rows: Trainer would drop the
    last batch or sort by length, and answers are matched to rows by their place."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        training = {name: getattr(self.args, name) for name in _HELD_OUT}
        vars(self.args).update(_HELD_OUT)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            vars(self.args).update(training)


_HELD_OUT = {"dataloader_drop_last": False, "train_sampling_strategy": "random"}  # arguments of an evaluation


@contextmanager
def judging(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, task: Task, model: PeftModel, *, progress: bool = False
) -> Iterator[Trainer]:
    """Give a Trainer that evaluates this model on the rows of `task`, and writes no files."""
    setup = Setup(recipe=recipe, tokenizer=tokenizer, task=task, model=model)
    with TemporaryDirectory() as scratch:
        trainer = setup.trainer(scratch, report_to="none")
        trainer.args.disable_tqdm = not progress
        yield trainer


def judge(trainer: Trainer) -> dict[str, float]:
    """Evaluate the model on the held-out rows; return the loss and the metrics of the task."""
    metrics = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
    return {key: value for key, value in metrics.items() if key not in _NO_METRICS}


_NO_METRICS = ("epoch", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""Trainer adds these to every evaluation, and they say nothing about the model."""


def ready_to_fit(recipe: Recipe, trainer: Trainer) -> None:
    """Remove label smoothing, so that a fit's gradients are of the loss that is proved, and metrics that are computed
    over all held-out rows and no part of them."""
    trainer.label_smoother = None
    if recipe.data.kind == "question_answering":
        trainer.compute_metrics = None


def resolve(recipe: Recipe) -> Recipe:
    """Return the recipe with its method's quantization (qlora: nf4) where it names none."""
    method = get_method(recipe.method.name)
    if method.quantization is None or recipe.model.quantization != "none":
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": method.quantization})})


def set_up(recipe: Recipe, *, record_to: Path | None = None) -> Setup:
    """Load data and model, and attach the adapter of the recipe's method.

    The seed is set before the head is initialised and again before the adapter is, so that both, and the order of the
    data, are the same for every method.
    """
    recipe = resolve(recipe)
    args = training_arguments(recipe)  # refuses a misspelt argument before the data is read
    check_fit(recipe)
    if not recipe.data.labelled:
        key = "data.completion" if recipe.data.kind in GENERATED else "data.label"
        raise UserError(f"{key} is null, and a training needs labels; name their column")
    tokenizer = load_tokenizer(recipe.model)
    task = load_task(recipe.data, tokenizer, recipe.seed, positions(recipe.model))
    load_test_sets(recipe.generate, recipe.data, tokenizer, task.held_out, recipe.seed)  # refuses mistakes in time
    base = load_model(recipe.model, recipe.data.kind, task.num_labels, tokenizer, recipe.seed)
    check_names(base, recipe.lora)
    check_random_weights(base, lora_config(recipe.lora, recipe.data.kind, base), recipe.model.name)
    model, method = begin_method(recipe, base)
    widen_heads(args, model)
    if recipe.fit is not None:
        lora_layers(model)  # refuses a model without any
        least, count = least_held_out(args.per_device_eval_batch_size), len(task.eval)
        if count < least:
            raise UserError(
                f"fit takes {least} held-out rows or more, and data has {count}; give more (data.eval_rows, "
                f"data.validation_fraction), or remove the section fit"
            )
    return Setup(recipe=recipe, tokenizer=tokenizer, task=task, model=model, method=method, record_to=record_to)


def widen_heads(args: TrainingArguments, model: nn.Module) -> None:
    """Convert modules that are trained in full to float32, as PEFT does with the adapter, because half precision rounds
    small steps away; refuse that without mixed precision, which casts their inputs."""
    for name, parameter in model.named_parameters():
        whole = parameter.requires_grad and ".modules_to_save." in name
        if not whole or parameter.dtype not in (torch.bfloat16, torch.float16):
            continue
        if args.mixed_precision == "no":  # which accelerate's launcher may say too
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UserError(
                f"{name} is trained in {dtype}, the type of the base's weights, in which small steps are rounded away; "
                f"set training.bf16 to true, with which it is float32, or model.dtype to float32"
            )
        parameter.data = parameter.data.float()


def check_fit(recipe: Recipe) -> None:
    """Refuse a fit of a method that trains no LoRA, or in several processes."""
    if recipe.fit is None:
        return
    if count_processes() > 1 or (is_launched() and asks_for_fsdp(recipe)):
        raise UserError(f"fit runs in one process; remove the section, and run: pedyra fit {recipe.output_dir}")
    if (kind := get_method(recipe.method.name).peft_type) != "LORA":
        raise UserError(
            f"fit asks how small a LoRA may be, and method {recipe.method.name} trains an adapter of type {kind}; "
            f"remove the section fit"
        )


def begin_method(recipe: Recipe, base: PreTrainedModel) -> tuple[PeftModel, Method | None]:
    """Give the base model the recipe's adapter, and return it with the method; see `Entry.begin`."""
    lora = lora_config(recipe.lora, recipe.data.kind, base, recipe.model.revision)
    return get_method(recipe.method.name).begin(base, lora, recipe.method.settings, recipe.seed)


def layer_rows(model: nn.Module) -> list[dict[str, Any]]:
    """List name, rank and parameters of every LoRA layer as they would be saved; empty for other adapters.

    E is not saved. Parameters that several layers share (RaSA's pools) are counted at the first layer, and of PEFT's
    AdaLoRA the ranks that its mask keeps, because the others are not saved.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    with_triples = {layer.name: layer.rank for layer in adapted_layers(model)}
    config: Any = getattr(model, "peft_config", {}).get("default")
    pattern = getattr(config, "rank_pattern", None) or {}  # of AdaLoRA a parameter's name -> its mask
    masks = {key.partition(".lora_E.")[0]: mask for key, mask in pattern.items() if ".lora_E." in key}
    rows: list[dict[str, Any]] = []
    earlier: set[int] = set()
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.r:
            layer: Any = module
            own = {
                id(parameter): parameter.numel()
                for path, parameter in layer.named_parameters()
                if "lora_" in path and "default" in path.split(".") and parameter.requires_grad and path[-2:] != ".E"
            }
            parameters = sum(count for key, count in own.items() if key not in earlier)
            earlier |= own.keys()
            whole: int = layer.r["default"]
            rank = sum(masks[name]) if name in masks else with_triples.get(name, whole)
            if name in masks:
                parameters = parameters // whole * rank
            rows.append({"layer": name, "rank": rank, "parameters": parameters})
    return rows

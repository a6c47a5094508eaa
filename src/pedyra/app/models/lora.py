"""A recipe's LoRA becomes PEFT's LoraConfig; names that match no module are refused."""

from __future__ import annotations

import re

from peft import LoraConfig, TaskType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from pedyra.app.models.base import MORE_HEADS, task_type
from pedyra.app.recipe_sections import LoraSection
from pedyra.errors import REFUSALS, UserError, as_user_error


def lora_config(section: LoraSection, kind: str, model: nn.Module, revision: str | None = None) -> LoraConfig:
    """Make PEFT's LoraConfig, which names the `revision` of the base for whoever loads the adapter; its task type has a
    new head trained and saved."""
    modules_to_save = [*(section.modules_to_save or ()), *_new_heads(model, kind)]
    exclude_modules = section.exclude_modules
    if kind == "question_answering" and section.target_modules == "all-linear" and not isinstance(exclude_modules, str):
        exclude_modules = [*(exclude_modules or ()), "qa_outputs"]  # this head is trained in full
    with as_user_error("lora", *REFUSALS):
        return LoraConfig(
            revision=revision,
            task_type=task_type(kind),
            r=section.r,
            lora_alpha=section.alpha,  # pyright: ignore[reportArgumentType] (PEFT takes fractions too)
            lora_dropout=section.dropout,
            rank_pattern=section.rank_pattern,
            alpha_pattern={name: section.alpha * rank / section.r for name, rank in section.rank_pattern.items()},
            target_modules=section.target_modules,
            exclude_modules=exclude_modules,
            init_lora_weights=section.init,  # pyright: ignore[reportArgumentType] (PEFT checks the name)
            use_dora=section.use_dora,
            use_rslora=section.use_rslora,
            bias=section.bias,
            modules_to_save=modules_to_save or None,
        )


def _new_heads(model: nn.Module, kind: str) -> list[str]:
    """List heads of a classifier that PEFT does not know, such as DeBERTa's pooler. A base's checkpoint lacks their
    weights, so that they are trained, and saved with the adapter."""
    if task_type(kind) != TaskType.SEQ_CLS:
        return []
    random_weights, names = {*getattr(model, "random_weights", ())}, [name for name, _ in model.named_modules()]
    heads = []
    for name, child in model.named_children():
        weights = {f"{name}.{weight}" for weight, _ in child.named_parameters()}
        # PEFT matches the ends of names, so that a name which other names end in would match more than this head.
        new = bool(weights) and weights <= random_weights and sum(each.endswith(name) for each in names) == 1
        is_other = name not in (*SEQ_CLS_HEAD_NAMES, getattr(model, "base_model_prefix", ""))
        if name in MORE_HEADS or (new and is_other):
            heads.append(name)
    return heads


def check_random_weights(model: nn.Module, config: LoraConfig, name: str) -> None:
    """Refuse a base with random weights, which its checkpoint lacks, that are not saved with the adapter: they would be
    others wherever the adapter is loaded."""
    modules_to_save = [*(config.modules_to_save or ())]
    trainable = {*modules_to_save, *(SEQ_CLS_HEAD_NAMES if config.task_type == TaskType.SEQ_CLS else ())}
    trainable |= {"qa_outputs"} if config.task_type == TaskType.QUESTION_ANS else set()
    weights: dict[str, str] = {}
    for weight in getattr(model, "random_weights", ()):
        parts = weight.split(".")[:-1]
        modules = [".".join(parts[: count + 1]) for count in range(len(parts))]
        if not any(_is_called(module, key) for module in modules for key in trainable):
            weights.setdefault(".".join(parts), weight)
    if weights:
        raise UserError(
            f"the checkpoint of model.name {name!r} has no {' and no '.join(weights.values()):.300}, drawn at random "
            f"here; a LoRA would not save it, so that it would be another one elsewhere; take another checkpoint, or "
            f"train it whole: lora.modules_to_save=[{', '.join([*modules_to_save, *weights]):.300}]"
        )


def check_names(model: nn.Module, section: LoraSection) -> None:
    """Refuse a name of target_modules, exclude_modules or modules_to_save that matches no module; PEFT ignores it."""
    names = [name for name, _ in model.named_modules()]
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        patterns = getattr(section, key)
        if patterns is None or patterns == "all-linear":
            continue
        if isinstance(patterns, str):
            try:
                strays = [] if any(re.fullmatch(patterns, name) for name in names) else [patterns]
            except re.error as error:
                raise UserError(f"lora.{key}: {patterns!r} is no regular expression: {error}") from None
        else:
            strays = [pattern for pattern in patterns if not any(_is_called(name, pattern) for name in names)]
        if strays:
            linear = {name.rpartition(".")[2]: 0 for name, each in model.named_modules() if isinstance(each, nn.Linear)}
            raise UserError(
                f"lora.{key}: {strays[0]!r} matches no module of the model; candidates: {', '.join(linear)}"
            )


def _is_called(name: str, key: str) -> bool:
    return name == key or name.endswith("." + key)

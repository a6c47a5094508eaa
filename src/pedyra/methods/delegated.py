"""Methods that are a LoraConfig and nothing else: PEFT's own, never rewritten."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from pedyra.methods.adapter import with_lora
from pedyra.methods.method import Adaptation
from pedyra.recipe import Recipe
from pedyra.tasks import Task


def prepare_lora(
    base_model: PreTrainedModel, recipe: Recipe, task: Task, *, record_to: Path | None = None
) -> Adaptation:
    """LoRA (Hu et al. 2021) as `recipe.lora` describes it."""
    return Adaptation(model=with_lora(base_model, recipe))

"""The `training` section of a recipe as transformers.TrainingArguments."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
from transformers import TrainingArguments

from pedyra.recipe import Recipe


def training_arguments(recipe: Recipe, **overrides: Any) -> TrainingArguments:
    """TrainingArguments of a recipe: its `training` section, output_dir and seed, then `overrides`.

    Raises ValueError for a name TrainingArguments does not have (with the nearest one), and for what it refuses.
    """
    known = [field.name for field in fields(TrainingArguments)]
    for name in recipe.training:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "see the documentation of transformers.TrainingArguments"
            raise ValueError(f"training.{name} is no argument of transformers.TrainingArguments; {hint}")
    settings = {
        # Pinning without an accelerator does nothing but warn.
        "dataloader_pin_memory": torch.cuda.is_available(),
        **recipe.training,
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        **overrides,
    }
    try:
        return TrainingArguments(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"training: {' '.join(str(error).split())}") from error

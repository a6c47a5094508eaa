"""PE-DyRA, with our defaults and as the paper has it."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from pedyra.allocate.rule import Rule, bidirectional
from pedyra.methods.adapter import with_lora
from pedyra.methods.adaptive import adaptive
from pedyra.methods.method import Adaptation
from pedyra.methods.pedyra.settings import Settings
from pedyra.methods.settings import method_settings, no_settings
from pedyra.recipe import Recipe
from pedyra.tasks import Task


def prepare(base_model: PreTrainedModel, recipe: Recipe, task: Task, *, record_to: Path | None = None) -> Adaptation:
    """PE-DyRA: prune and expand at a conserved budget of layers x lora.r ranks, or of their parameters.

    `recipe.rank` has all that users choose; method pedyra-paper starts from `RankConfig.paper`. It goes on top of DoRA,
    PiSSA (`lora.use_dora`, `lora.init`) and QLoRA (`model.quantization`), Tables 11 and 12.
    """
    if recipe.method == "pedyra-paper":
        no_settings(recipe)
        rule = Rule(policy=bidirectional)
    else:
        rule = Rule(policy=bidirectional, settings=method_settings(recipe, Settings))
    return adaptive(with_lora(base_model, recipe), recipe.rank_config(), rule, record_to)

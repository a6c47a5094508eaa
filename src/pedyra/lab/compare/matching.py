"""Rows are made equal before they are compared: the rank at which each has the baseline's trainable parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pedyra.app.recipe import Recipe
from pedyra.methods.registry import get_method

TOLERANCE = 0.05
"""How far from the baseline's the number of parameters may be, relative to it."""


@dataclass(frozen=True)
class Matched:
    """What matching decided for one row, kind of task and budget."""

    r: int
    """lora.r of its recipes; alpha goes along, so that alpha / r stays."""
    method_settings: dict[str, Any] = field(default_factory=dict)
    """Of methods whose own settings decide on their parameters (RandLoRA)."""


class ParameterCount:
    """Trainable parameters of adapters on one base model, counted on the model itself; a head is left out.

    Args:
        recipe: the baseline's; for the model, its tokenizer and the kind of data.
    """

    def __init__(self, recipe: Recipe) -> None:
        from pedyra.app.models import load_model, load_tokenizer

        kind = recipe.data.kind
        classes = {"causal_lm": None, "regression": 1}.get(kind, 2)
        # Quantised weights are packed, but their adapter is the same.
        section = recipe.model.model_copy(update={"quantization": "none"})
        self.base = load_model(section, kind, classes, load_tokenizer(section), recipe.seed)
        self._known: dict[str, int] = {}

    def request(self, recipe: Recipe) -> Any:
        """What the recipe asks of its method, on this base model."""
        from pedyra.app.runs.setup import request

        return request(recipe, self.base, None)

    def lora(self, recipe: Recipe, r: int) -> int:
        """Of the LoRA of the recipe and its method at rank r. E of the dynamic methods, r a layer, is not counted."""

        lora = recipe.lora.model_copy(update={"r": r, "init": True, **get_method(recipe.method).lora})
        key = lora.model_dump_json()
        if key not in self._known:
            wanted = self.request(recipe.model_copy(update={"lora": lora}))
            self._known[key] = _trained(wanted.with_lora())
        return self._known[key]

    def prepared(self, recipe: Recipe, settings: Mapping[str, Any]) -> int:
        """Of what the recipe's method makes with these settings of its own."""
        recipe = recipe.model_copy(update={"method_settings": {**recipe.method_settings, **settings}})
        return _trained(get_method(recipe.method).prepare(self.request(recipe)).model)


def match_parameters(name: str, recipe: Recipe, budget: int, baseline: Recipe, count: ParameterCount) -> Matched:
    """The rank at which a row has the trainable parameters of the baseline at lora.r = budget.

    Counted at the start of training. A dynamic method keeps that count or ends at it by its own budget; what each run
    had at its end is in the results.

    Raises:
        ValueError: it cannot within 5 %; with the closest two.
    """
    target = count.lora(baseline, budget)
    at_budget = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"r": budget})})
    if own := get_method(recipe.method).nearest_settings(count.request(at_budget), target):
        (setting,) = own[0]
        counts = {values[setting]: count.prepared(at_budget, values) for values in own}
        check_match(name, f"method_settings.{setting}", target, counts)
        return Matched(budget, own[0])
    ranks = nearest_ranks(lambda r: count.lora(recipe, r), target, budget)
    check_match(name, "lora.r", target, {r: count.lora(recipe, r) for r in ranks})
    return Matched(ranks[0])


def nearest_ranks(count: Callable[[int], int], target: int, start: int) -> list[int]:
    """The two ranks whose counts are nearest to `target`, the nearest first; of two equally near, the smaller.

    Args:
        count: rank -> number of parameters, which grows linearly.
        start: any rank.
    """
    low = max(1, start + (target - count(start)) // (count(start + 1) - count(start)))
    return sorted((low, low + 1), key=lambda r: (abs(count(r) - target), r))


def check_match(name: str, setting: str, target: int, counts: Mapping[int, int]) -> None:
    """Raise ValueError where the nearest number of parameters is more than 5 % off.

    Args:
        setting: what was varied.
        counts: its values -> numbers of parameters, nearest first.
    """
    if abs(next(iter(counts.values())) - target) <= TOLERANCE * target:
        return
    closest = " and ".join(f"{count:,} at {setting} {value}" for value, count in counts.items())
    raise ValueError(
        f"method {name} cannot match the baseline's {target:,} parameters within {TOLERANCE:.0%}: "
        f"the closest are {closest}; choose other budgets, or methods.{name}.match: rank to compare it as it is"
    )


def _trained(model: Any) -> int:
    """Parameters that are trained, but for a head; the adapter is taken off the base again."""
    named = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    model.unload()
    return sum(count for name, count in named if "modules_to_save" not in name)

"""What is made equal before methods are compared: trainable parameters, the rank, peak memory or training time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pedyra.app.recipe import Recipe, check_recipe
from pedyra.app.runs.resolve import resolve
from pedyra.methods.registry import get_method

TOLERANCE = 0.05
"""How far from the baseline's a matched quantity may be, relative to it."""


@dataclass(frozen=True)
class Matched:
    """What matching decided for one row, task and budget."""

    r: int
    """lora.r of its recipes, or what they end with (`wide`); alpha goes along, so that alpha / r stays."""
    method_settings: dict[str, Any] = field(default_factory=dict)
    """Of methods whose own settings decide on their parameters (RandLoRA)."""
    max_steps: int | None = None
    """Other steps than the baseline's, to match the time."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def nearest_rank(cost: Callable[[int], float], target: float, start: int) -> tuple[int, list[int]]:
    """The rank whose cost is nearest to `target`, and the two nearest ones (one if it is exact).

    The cost must grow with the rank, about linearly. Of two equally near, the cheaper is the nearest.
    """
    if cost(start) == target:
        return start, [start]
    slope = cost(start + 1) - cost(start)
    guess = max(1, start + math.floor((target - cost(start)) / slope)) if slope > 0 else start
    while guess > 1 and cost(guess) > target:
        guess -= 1
    while slope > 0 and cost(guess + 1) <= target:
        guess += 1
    closest = sorted({guess, guess + 1}, key=lambda r: (abs(cost(r) - target), cost(r)))
    return closest[0], closest


def check_match(name: str, what: str, knob: str, target: float, costs: Mapping[int, float]) -> None:
    """Refuse a row whose nearest cost is more than 5 % off.

    Args:
        costs: rank -> cost of the closest ranks, nearest first.

    Raises:
        ValueError: with the closest two.
    """
    nearest = next(iter(costs.values()))
    if abs(nearest - target) <= TOLERANCE * target:
        return
    closest = " and ".join(f"{cost:,} at {knob} {rank}" for rank, cost in costs.items())
    raise ValueError(
        f"method {name} cannot match the baseline's {target:,} {what} within {TOLERANCE:.0%}: "
        f"the closest are {closest}; choose other budgets, or methods.{name}.match: rank to compare it as it is"
    )


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
        self._base = load_model(section, kind, classes, load_tokenizer(section), recipe.seed)
        self._known: dict[str, int] = {}

    def lora(self, recipe: Recipe, r: int) -> int:
        """Of the LoRA of the recipe and its method at rank r. E of the dynamic methods, r a layer, is not counted."""
        from pedyra.app.runs.setup import request
        from pedyra.methods.adapter import with_lora

        lora = recipe.lora.model_copy(update={"r": r, "init": True, **get_method(recipe.method).lora})
        key = lora.model_dump_json()
        if key not in self._known:
            wanted = request(recipe.model_copy(update={"lora": lora}), self._base, None)
            self._known[key] = self._count(with_lora(wanted))
        return self._known[key]

    def prepared(self, recipe: Recipe, settings: Mapping[str, Any]) -> int:
        """Of what the recipe's method makes with these settings of its own."""
        from pedyra.app.runs.setup import request

        recipe = recipe.model_copy(update={"method_settings": {**recipe.method_settings, **settings}})
        return self._count(get_method(recipe.method).prepare(request(recipe, self._base, None)).model)

    def nearest_settings(self, recipe: Recipe, target: int) -> list[dict[str, Any]]:
        """`Method.nearest_settings` of the recipe's method."""
        from pedyra.app.runs.setup import request

        return get_method(recipe.method).nearest_settings(request(recipe, self._base, None), target)

    def _count(self, model: Any) -> int:
        trained = [
            parameter.numel()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and "modules_to_save" not in name
        ]
        model.unload()
        return sum(trained)


def match_parameters(name: str, recipe: Recipe, budget: int, baseline: Recipe, count: ParameterCount) -> Matched:
    """The rank at which a row has the trainable parameters of the baseline at lora.r = budget.

    Counted at the start of training. A dynamic method keeps that count or ends at it by its own budget; what each run
    had at its end is in the results.

    Raises:
        ValueError: it cannot within 5 %; with the closest two.
    """
    target = count.lora(baseline, budget)
    at_budget = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"r": budget})})
    if own := count.nearest_settings(at_budget, target):
        (knob,) = own[0]
        costs = {settings[knob]: count.prepared(at_budget, settings) for settings in own}
        check_match(name, "parameters", f"method_settings.{knob}", target, costs)
        return Matched(budget, own[0])
    nearest, closest = nearest_rank(lambda r: count.lora(recipe, r), target, budget)
    check_match(name, "parameters", "lora.r", target, {r: count.lora(recipe, r) for r in closest})
    return Matched(nearest)


def match_memory(name: str, recipe: Recipe, budget: int, baseline: Recipe) -> Matched:
    """The rank at which a row's training holds as many bytes as the baseline's, by the plan of `pedyra train`.

    Raises:
        ValueError: it cannot within 5 %, with the closest two; or a plan is refused at lora.r = budget.
    """
    known: dict[tuple[bool, int], float] = {}

    def cost(recipe: Recipe, r: int) -> float:
        key = (recipe is baseline, r)  # not the method: a row may be the baseline's method with other layers
        if key not in known:
            try:
                known[key] = planned_memory(with_rank(recipe, r))
            except ValueError:
                if r == budget:
                    raise
                known[key] = math.inf  # a rank that the method cannot have, e.g. 1 where a rank has to move
        return known[key]

    target = cost(baseline, budget)
    nearest, closest = nearest_rank(lambda r: cost(recipe, r), target, budget)
    costs = {r: cost(recipe, r) for r in closest if cost(recipe, r) < math.inf}
    check_match(name, "bytes", "lora.r", target, costs)
    return Matched(nearest)


def with_rank(recipe: Recipe, r: int) -> Recipe:
    """The recipe at another rank, with the same scaling alpha / r."""
    alpha = recipe.lora.alpha * r / recipe.lora.r
    return recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"r": r, "alpha": alpha})})


def planned_memory(recipe: Recipe) -> int:
    """Bytes that training holds, as `pedyra train --dry-run` tells them. Raises ValueError with what it refuses."""
    from pedyra.app.runs.plan import make_plan
    from pedyra.app.runs.setup import set_up

    try:
        return make_plan(set_up(recipe)).memory.total
    except ValueError as error:
        raise ValueError(f"no plan for method {recipe.method}: {error}") from None


def match_steps(budget: int, steps: int, seconds: float, baseline_seconds: float) -> Matched:
    """As many steps as take the baseline's time, from one whole run of each at equal `steps`."""
    return Matched(budget, max_steps=max(1, round(steps * baseline_seconds / seconds)))


def checked(content: dict[str, Any], where: str) -> Recipe:
    """The recipe of a row, as its method resolves it; ValueError for what can be told from the recipe alone."""
    recipe = check_recipe(content, where)
    try:
        return resolve(recipe)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None

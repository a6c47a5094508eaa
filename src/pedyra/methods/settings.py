"""A recipe's settings for one method, checked against what the method has and what it fixes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from pedyra.config import RankConfig
from pedyra.recipe import Recipe
from pedyra.spelling import did_you_mean

Settings = TypeVar("Settings")

SCHEDULE = ("interval", "initial_warmup", "final_warmup")
"""Fields of RankConfig that every method with a schedule takes from the recipe."""

SCORED: dict[str, Any] = dict(initial_warmup=0.05, min_rank=1)
"""What methods that score triples start from, where they do not say otherwise."""

SCORE_FIELDS = (
    *("alpha", "beta1", "beta2", "score_norm", "input_norm", "omega", "omega_ema", "layer_score", "orth_form"),
    *("orth_weight", "start", "budget", "min_rank", "max_rank"),
)
"""What an ablation of PE-DyRA shares with it: all but what moves and how many."""


def method_settings(recipe: Recipe, kind: type[Settings]) -> Settings:
    """`recipe.method_settings` as the method's own dataclass, which checks their values.

    Raises:
        ValueError: a name the method does not have, with the nearest or all of its own.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in recipe.method_settings:
        if name not in known:
            hint = did_you_mean(name, known, otherwise=f"it has {', '.join(known) or 'none'}")
            raise ValueError(f"method_settings.{name} is no setting of method {recipe.method}; {hint}")
    return kind(**recipe.method_settings)


def no_settings(recipe: Recipe) -> None:
    """For a method without settings of its own: raises ValueError where the recipe gives any."""
    for name in recipe.method_settings:
        raise ValueError(f"method_settings.{name}: method {recipe.method} has no settings of its own; remove it")


def rank_config(recipe: Recipe, *, open_fields: Sequence[str] = (), **fixed: Any) -> RankConfig:
    """The RankConfig of a method that scores triples: `fixed` over the defaults; schedule and `open_fields` as given.

    An open field may be in `fixed` too, as the method's own default. Fields of `recipe.rank` that are neither have no
    part in the method and are passed over, as method lora does with all of them: recipes of a comparison share them.

    Raises:
        ValueError: `recipe.rank` contradicts a field that makes the method what it is.
    """
    free = {*SCHEDULE, "seed", *open_fields}
    for name, value in recipe.rank.items():
        if name in fixed and name not in free and value != fixed[name]:
            raise ValueError(
                f"rank.{name} is {value!r}, but method {recipe.method} is defined by {fixed[name]!r}; remove it"
            )
    return RankConfig.scored(**{"seed": recipe.seed, **SCORED, **fixed, **_given(recipe, free)})


def paper_config(recipe: Recipe, *open_fields: str) -> RankConfig:
    """The RankConfig of an ablation of the paper: its settings, and what the recipe gives of these fields."""
    free = {*SCHEDULE, "seed", *SCORE_FIELDS, *open_fields}
    return RankConfig.paper(**{"seed": recipe.seed, **_given(recipe, free)})


def _given(recipe: Recipe, free: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in recipe.rank.items() if name in free}


def refuse_lora(recipe: Recipe, reason: str, *names: str) -> None:
    """Raise ValueError, with the reason, if one of these fields of `recipe.lora` is not at its default."""
    for name in names:
        value, default = getattr(recipe.lora, name), type(recipe.lora).model_fields[name].default
        if value != default:
            raise ValueError(
                f"lora.{name} is {value!r}, but {reason}; leave it at {default!r} with method {recipe.method}"
            )


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds: for checks in the settings of a method."""
    if not condition:
        raise ValueError(message)

"""The settings of a request, checked against what the method has and what it fixes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from peft import LoraConfig

from pedyra.methods.method import Request
from pedyra.pe_dyra.config import RankSettings

SCHEDULE = ("interval", "initial_warmup", "final_warmup")
"""Fields of the section `rank` that every method with a schedule takes from the recipe."""

SCORED: dict[str, Any] = dict(
    interval=0.05,
    initial_warmup=0.05,
    final_warmup=0.25,
    moves=None,
    budget="parameters",
    start="lora",
    orth_weight=0.0,
)
"""What the rivals that score triples start from, where they do not say otherwise: one schedule for all of them."""

SCORE_FIELDS = (
    *("alpha", "beta1", "beta2", "score_norm", "input_norm", "omega", "omega_ema", "layer_score", "orth_form"),
    *("orth_weight", "start", "budget", "min_rank", "max_rank"),
)
"""What an ablation of PE-DyRA shares with it: all but what moves and how many."""


def rank_settings(request: Request, *, open_fields: Sequence[str] = (), **fixed: Any) -> RankSettings:
    """The settings of a rival that scores triples: `fixed` over the defaults; schedule and `open_fields` as given.

    An open field may be in `fixed` too, as the method's own default. Fields of `request.rank` that are neither have no
    part in the method and are passed over, as method lora does with all of them: recipes of a comparison share them.

    Raises:
        ValueError: `request.rank` contradicts a field that makes the method what it is.
    """
    free = {*SCHEDULE, "fused", "seed", *open_fields}
    for name, value in request.rank.items():
        if name in fixed and name not in free and value != fixed[name]:
            raise ValueError(
                f"rank.{name} is {value!r}, but method {request.method} is defined by {fixed[name]!r}; remove it"
            )
    return RankSettings(**{"seed": request.seed, **SCORED, **fixed, **_given(request, free)})


def ablation_settings(request: Request, *open_fields: str) -> RankSettings:
    """The settings of an ablation of PE-DyRA: the paper's, and what the recipe gives of these fields."""
    free = {*SCHEDULE, "fused", "seed", *SCORE_FIELDS, *open_fields}
    return RankSettings(**{"seed": request.seed, **_given(request, free)})


def _given(request: Request, free: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in request.rank.items() if name in free}


def refuse_lora(request: Request, reason: str, *names: str) -> None:
    """Raise ValueError, with the reason, if one of these fields of the LoRA is not at its default."""
    for name in names:
        field = {"init": "init_lora_weights"}.get(name, name)
        value, default = getattr(request.lora, field), LoraConfig.__dataclass_fields__[field].default
        if value != default:
            raise ValueError(
                f"lora.{name} is {value!r}, but {reason}; leave it at {default!r} with method {request.method}"
            )


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds: for checks in the settings of a method."""
    if not condition:
        raise ValueError(message)

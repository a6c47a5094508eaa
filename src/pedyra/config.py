"""RankConfig: what a user chooses of rank adaptation, in frozen records that are checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from typing import Any, Literal

from pedyra.lora.spelling import did_you_mean

# Values a string field may take; docs/decisions.md says why.
CHOICES: dict[str, tuple[str, ...]] = {
    "budget": ("parameters", "ranks", "fit"),
    "start": ("lora", "svd"),
    "score_norm": ("mean", "rank", "none"),
    "input_norm": ("mean_square", "rms"),
    "omega": ("gradient", "uniform"),
    "layer_score": ("before", "after"),
    "orth_form": ("norm", "squared"),
}

_METHOD = "the method decides it, and it is no setting any more"
_MOVES = (
    "method pedyra moves no triples; it starts wide and cuts (rank.target_rank), and method pedyra-paper moves them"
)
REMOVED: dict[str, str] = {
    "expand": "method pedyra does not grow; use method pedyra-paper for Eq. (7)",
    "prune": "method pedyra measures what a direction is worth; use method pedyra-paper for the lowest score",
    "score": "method pedyra orders directions by what they are worth; use method pedyra-paper for Algorithm 1",
    "train_e": 'E is trained with rank.start "svd"',
    **{name: _METHOD for name in ("new_moments", "turn")},
    **{name: _MOVES for name in ("moves_schedule", "init", "deal", "reassignment")},
    **{name: _MOVES for name in ("certainty", "margin", "patience", "sketch_steps", "sketch_size")},
}
"""Fields that earlier recipes have -> what took their place."""


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Algorithm 1 of the paper, Eqs. (3) to (7), and the form of Eq. (2): how triples and layers are scored.

    Raises:
        ValueError: a value outside its range, with the value, the rule and the repair.
    """

    __pydantic_config__ = {"use_attribute_docstrings": True}  # for the schema of recipes

    alpha: float = 0.5
    """Weight of the gradient score against the input score in Alg. 1, step 3. The paper names no value. 1: no forward
    hooks, 0: no averages of the parameters' size."""
    beta1: float = 0.85
    """EMA of the sensitivity and of the input energy, Eq. (3). AdaLoRA's value; the paper names none."""
    beta2: float = 0.85
    """EMA of the uncertainty, Eq. (3). AdaLoRA's value; the paper names none."""
    score_norm: str = "mean"
    """Before mixing, divide each score by its mean over all triples ("mean"), replace it by its percentile ("rank"),
    or mix it as it is ("none", literal; then the input score decides alone, see docs/decisions.md)."""
    input_norm: str = "mean_square"
    """||X_j|| of Eq. (6): "mean_square" as the paper writes it, "rms" its square root."""
    omega: str = "gradient"
    """Weights of A, E, B in Eq. (4): "gradient" is Eq. (5), "uniform" the plain sum of AdaLoRA."""
    omega_ema: bool = False
    """Smooth the gradient norms of Eq. (5) with beta1, instead of taking those of the adjustment step (literal)."""
    layer_score: str = "before"
    """Eq. (7) on the triples "before" or "after" the pruning of the same adjustment."""
    orth_form: str = "norm"
    """Eq. (2) as AdaLoRA's code has it, the un-squared norm averaged over the 2 L matrices, or literal, "squared"."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_numbers(self, "alpha", "beta1", "beta2")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"rank.{name} is {getattr(self, name)}; an EMA coefficient lies in [0, 1)")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"rank.alpha is {self.alpha}; it weighs two scores and lies in [0, 1]")
        _check_switches(self, "omega_ema")


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """Settings of rank adaptation. `RankConfig()` is our default, `RankConfig.paper()` the paper.

    Raises:
        ValueError: a value outside its range, with the value, the rule and the repair.
    """

    __pydantic_config__ = {"use_attribute_docstrings": True}  # for the schema of recipes

    interval: int | float = 0.05
    """Optimizer steps between adjustments (paper: Delta_T); a float below 1 is a fraction of the run, with method
    pedyra 10 steps at least."""
    moves: int | None = None
    """Triples moved per adjustment at most (paper: k = 12 of 576). None: 2 % of the total rank; method pedyra moves
    none, it cuts. 0: ranks stay as they are."""
    initial_warmup: int | float = 0.0
    """Steps before the first interval begins (paper: t_i); a float below 1 is a fraction of the run. 0 with method
    pedyra: 60 % of the run, or 15 % with a `target_rank`."""
    final_warmup: int | float = 0.1
    """LENGTH of the last phase, without adjustments (paper: t_f); a float below 1 is a fraction of the run. 0.25 with
    methods that move triples."""

    budget: str = "fit"
    """What the run ends with. "fit": the smallest adapter that gives up at most `tolerance` of what was won. Of methods
    that move triples: "parameters" (never above the initial count) or "ranks" (paper: their sum is constant)."""
    tolerance: float = 0.01
    """With budget "fit": the part of what fine-tuning won, the fall of the loss, that may be given up."""
    target_rank: int | None = None
    """With budget "fit": end with the parameters of a LoRA of this rank, whatever that costs, placed where they are
    worth most; begin with about four times the rank. None: `tolerance` decides how many."""
    min_rank: int = 0
    """No layer falls below this rank (paper: 1)."""
    max_rank: int | None = None
    """No layer grows above this rank; None: only the layer's own width bounds it."""

    start: str = "lora"
    """"lora": E = 1, not trained, A and B as PEFT made them, an identity on any LoRA; "svd": A, B ~ N(0, 0.02^2) and a
    trained E = 0 (paper)."""
    orth_weight: float = 0.0
    """Coefficient of Eq. (2) (paper: gamma = lambda, 0.1 or 0.3)."""
    fused: bool | Literal["auto"] = "auto"
    """Compute base layer and triples together where that is exact (plain linear base, no dropout, no DoRA): faster,
    in less memory; PEFT's own forward runs elsewhere. Roundings differ, and no gradient of a gradient is there.
    "auto": on a CPU; on a GPU, where it has not been measured, PEFT's forward runs. False: PEFT's, to the last bit."""
    seed: int = 0
    """Seed of the new triples; they never draw from torch's global generator."""

    importance: Importance | None = None
    """None: method pedyra, which measures what directions save of the loss. A record: the paper's method, by it."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():  # NumPy's integers are none that JSON knows
            if isinstance(value, Integral) and not isinstance(value, (bool, int)):
                object.__setattr__(self, name, int(value))
        _check_choices(self)
        for name in ("interval", "initial_warmup", "final_warmup"):
            check_steps(f"rank.{name}", getattr(self, name), least=1 if name == "interval" else 0)
        _check_numbers(self, "orth_weight")
        if self.orth_weight < 0:
            raise ValueError(f"rank.orth_weight is {self.orth_weight}; a penalty is 0 (off) or positive")
        if self.fused != "auto":
            _check_switches(self, "fused")
        for name, least in (("moves", 0), ("max_rank", 1), ("target_rank", 1), ("min_rank", 0), ("seed", 0)):
            if getattr(self, name) is not None or name in ("min_rank", "seed"):
                check_count(f"rank.{name}", getattr(self, name), least)
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise ValueError(f"rank.max_rank is {self.max_rank}, below rank.min_rank {self.min_rank}; raise it")
        _check_numbers(self, "tolerance")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"rank.tolerance is {self.tolerance}; it is a part of what was won, in (0, 1), e.g. 0.01")
        if self.target_rank is not None and self.budget != "fit":
            raise ValueError(f"rank.target_rank is {self.target_rank}, a size for rank.budget 'fit'; set that")
        if not isinstance(self.importance, Importance | None):
            raise ValueError(f"rank.importance is {self.importance!r}; it must be an Importance, or left out")
        self._check_method()

    def _check_method(self) -> None:
        """What only one of the two methods has."""
        if self.importance is not None and self.budget == "fit":
            raise ValueError("rank.budget is 'fit', of method pedyra; the paper's conserves ranks or parameters")
        if self.importance is not None:
            return
        moved = "of methods that move triples; leave it out, or take RankConfig.paper (method pedyra-paper)"
        if self.budget != "fit":
            raise ValueError(f"rank.budget is {self.budget!r}, {moved}")
        if self.start != "lora":
            raise ValueError(f"rank.start is {self.start!r}, {moved}")
        if self.moves:
            raise ValueError(f"rank.moves is {self.moves}, {moved}; 0 keeps all ranks")
        if self.max_rank is not None:
            raise ValueError(f"rank.max_rank is {self.max_rank}, but method pedyra lets no layer grow; lower lora.r")

    @property
    def orth_form(self) -> str:
        """The form of Eq. (2) that `orth_weight` weighs."""
        return (self.importance or Importance()).orth_form

    @classmethod
    def paper(cls, **overrides: Any) -> RankConfig:
        """PE-DyRA as the paper has it, and these readings where it is silent or cannot be taken at its word.

        - t_i, Delta_T and t_f are medians of their parts of the run over the twelve rows of Tables 7 to 9 (GLUE, the
          two tasks of Table 8, XSum, SQuAD), T being epochs times batches: t_i / T is 0.02 to 0.18, median 0.06;
          Delta_T / T 0.005 to 0.044, median 0.023; t_f / T 0.32 to 0.92, median 0.64. k = 12 and gamma = 0.1 (six of
          the eight tasks of Table 7).
        - `score_norm` "mean": the literal sum, "none", lets the input score decide alone.
        - `orth_form` "norm": AdaLoRA's form, for which the weights were tuned; "squared" is Eq. (2) as written.
        - `layer_score` "before": Eq. (7) sees the triples before the pruning of the same adjustment.
        - Eqs. (3) and (5) see the gradient of the task alone, without that of Eq. (2).
        - Eqs. (3) and (6) read the weights before the optimizer step, to which the gradient belongs.
        - alpha, beta1 and beta2 are not named: 0.5, and AdaLoRA's 0.85. A, B ~ N(0, 0.02^2) and E = 0 at the start and
          in new triples, whose moments begin at zero.

        Args:
            overrides: fields of this record, or of `Importance`, by name.
        """
        settings: dict[str, Any] = dict(
            interval=0.023, moves=12, initial_warmup=0.06, final_warmup=0.64, budget="ranks", min_rank=1, start="svd",
            orth_weight=0.1,
        )  # fmt: skip
        return cls.scored(**{**settings, **overrides})

    @classmethod
    def scored(cls, **settings: Any) -> RankConfig:
        """The config of a method that scores triples: fields of this record and of `Importance` side by side."""
        ours = {field.name for field in fields(Importance)}
        importance = Importance(**{name: value for name, value in settings.items() if name in ours})
        own = {"importance": importance, "budget": "parameters", "final_warmup": 0.25}
        return cls.from_dict(own | {name: value for name, value in settings.items() if name not in ours})

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> RankConfig:
        """The config with these settings, `importance` perhaps a mapping: the inverse of `to_dict`.

        Raises:
            ValueError: an unknown name, with the nearest known one, one that was removed, with what took its place, or
                one of `Importance`, which is given inside it.
        """
        for name in settings:
            check_name(str(name))
            if name in (field.name for field in fields(Importance)):
                raise ValueError(
                    f"rank.{name} is of the paper's scores, which method pedyra does not use; take method pedyra-paper "
                    f"(RankConfig.paper), or leave it out"
                )
        given = settings.get("importance")
        if isinstance(given, Mapping):
            return cls(**{**settings, "importance": Importance(**given)})
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, for JSON."""
        return asdict(self)


def without_fit(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What another method takes of a `rank` that it shares with method pedyra: all but how that one ends.

    Raises:
        ValueError: a tolerance or target rank that would be none of method pedyra either.
    """
    ours = {name: value for name, value in settings.items() if name in ("tolerance", "target_rank")}
    RankConfig(**ours)
    return {name: value for name, value in settings.items() if name not in ours and (name, value) != ("budget", "fit")}


def check_name(name: str) -> None:
    """Raise ValueError unless a recipe's `rank` may have this name: a field of `RankConfig` or of `Importance`."""
    known = [field.name for record in (RankConfig, Importance) for field in fields(record)]
    if name in REMOVED:
        raise ValueError(f"rank.{name} was removed: {REMOVED[name]}")
    if name not in known:
        raise ValueError(f"rank.{name} is not a setting; {did_you_mean(name, known)}")


def check_steps(name: str, value: Any, least: int = 0) -> None:
    """Raise ValueError unless the value is steps of a run, `least` or more, or a fraction of it, a float below 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {value!r}; give steps as an integer or a fraction of the run")
    if isinstance(value, float) and not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; a float is a fraction of the run in [0, 1), steps are integers")
    if value < 0 or (least and value == 0):
        raise ValueError(f"{name} is {value}; it must be {'positive' if least else '0 or more'}")


def check_count(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless the value is an integer of at least so much."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}")


def _check_choices(record: Any) -> None:
    for name, value in vars(record).items():
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"rank.{name} is {value!r}; it must be one of {', '.join(map(repr, CHOICES[name]))}")


def _check_numbers(record: Any, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"rank.{name} is {value!r}; it must be a finite number")


def _check_switches(record: Any, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(record, name), bool):
            raise ValueError(f"rank.{name} is {getattr(record, name)!r}; it must be true or false")

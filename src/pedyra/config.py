"""RankConfig: every choice the method leaves open, in one frozen record that is checked when it is made."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

# Values a string field may take; design decisions behind each are in docs/how_it_works.md.
CHOICES: dict[str, tuple[str, ...]] = {
    "moves_schedule": ("linear", "constant", "cubic"),
    "budget": ("parameters", "ranks"),
    "score_norm": ("mean", "rank", "none"),
    "input_norm": ("mean_square", "rms"),
    "omega": ("gradient", "uniform"),
    "layer_score": ("before", "after"),
    "orth_form": ("norm", "squared"),
    "start": ("lora", "svd"),
    "init": ("orthogonal", "gaussian", "gradient"),
    "expand": ("importance", "gradient"),
    "new_moments": ("seed", "zero"),
}


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """Settings of rank adaptation. `RankConfig()` is our default, `RankConfig.paper()` the paper to the letter.

    Raises:
        ValueError: a value outside its range, with the value, the rule and the repair.
    """

    interval: int | float = 0.05
    """Optimizer steps between adjustments (paper: Delta_T); a float below 1 is a fraction of the run."""
    moves: int | None = None
    """Triples moved per adjustment (paper: k). None: 2 % of the total rank, the paper's 12 of 576; 0: only observe."""
    moves_schedule: str = "linear"
    """k over the window of adjustments: "constant" (paper), "linear" to 1, or "cubic", k (1 - p^3) (ElaLoRA)."""
    initial_warmup: int | float = 0.1
    """Steps before the first interval begins (paper: t_i); a float below 1 is a fraction of the run."""
    final_warmup: int | float = 0.3
    """LENGTH of the last phase, without adjustments (paper: t_f); a float below 1 is a fraction of the run."""

    budget: str = "parameters"
    """What is conserved: "parameters" (never above the initial count) or "ranks" (paper: their sum is constant)."""
    min_rank: int = 1
    """No layer falls below this rank (paper: 1)."""
    max_rank: int | None = None
    """No layer grows above this rank; None: only the layer's own width bounds it."""

    alpha: float = 0.5
    """Weight of the gradient score against the input score in Alg. 1, step 3. The paper names no value."""
    beta1: float = 0.85
    """EMA of the sensitivity and of the input energy, Eq. (3). AdaLoRA's value; the paper names none."""
    beta2: float = 0.85
    """EMA of the uncertainty, Eq. (3). AdaLoRA's value; the paper names none."""
    score_norm: str = "mean"
    """Before mixing, divide each score by its mean over all triples ("mean"), replace it by its percentile ("rank"),
    or mix it as it is ("none", literal; then the input score decides alone, see docs/how_it_works.md)."""
    input_norm: str = "mean_square"
    """||X_j|| of Eq. (6): "mean_square" as the paper writes it, "rms" its square root."""
    omega: str = "gradient"
    """Weights of A, E, B in Eq. (4): "gradient" is Eq. (5), "uniform" the plain sum of AdaLoRA."""
    omega_ema: bool = False
    """Smooth the gradient norms of Eq. (5) with beta1, instead of taking those of the adjustment step (literal)."""
    layer_score: str = "before"
    """Eq. (7) on the triples "before" or "after" the pruning of the same adjustment."""

    orth_weight: float = 0.0
    """Coefficient of Eq. (2) (paper: gamma = lambda, 0.1 or 0.3)."""
    orth_form: str = "norm"
    """Eq. (2) as AdaLoRA's code has it, the un-squared norm averaged over the 2 L matrices, or literal, "squared"."""

    start: str = "lora"
    """"lora": E = 1, A and B as PEFT made them, an identity on any LoRA; "svd": A, B ~ N(0, 0.02^2), E = 0 (paper)."""
    init: str = "orthogonal"
    """Direction of a new triple: "orthogonal" to the layer's rows, or "gaussian". Its contribution starts at zero."""
    expand: str = "importance"
    """What chooses the layers that grow: "importance", Eq. (7), or "gradient", the loss a new triple would save."""
    sketch_steps: int = 21
    """Optimizer steps before an adjustment in which gradient directions are sketched (init or expand "gradient")."""
    sketch_size: int = 8
    """Candidate directions per layer and adjustment."""
    new_moments: str = "zero"
    """Adam's second moment of new rows: "zero" (first updates up to 6x lr, a kick that lets them catch up), or "seed":
    the kept rows' mean (a slow start, with which new triples tend to be pruned again)."""
    fused: bool = False
    """Compute base layer and triples together where that is exact (plain linear base, no dropout, no DoRA): faster,
    in less memory; elsewhere PEFT's own forward runs. Roundings differ, nothing else."""
    seed: int = 0
    """Seed of the new triples; they never draw from torch's global generator."""

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"rank.{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")
        for name in ("interval", "initial_warmup", "final_warmup"):
            self._check_steps(name, getattr(self, name))
        for name in ("alpha", "beta1", "beta2", "orth_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"rank.{name} is {value!r}; it must be a finite number")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"rank.{name} is {getattr(self, name)}; an EMA coefficient lies in [0, 1)")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"rank.alpha is {self.alpha}; it weighs two scores and lies in [0, 1]")
        if self.orth_weight < 0:
            raise ValueError(f"rank.orth_weight is {self.orth_weight}; a penalty is 0 (off) or positive")
        for name in ("omega_ema", "fused"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"rank.{name} is {getattr(self, name)!r}; it must be true or false")
        for name, least in (("moves", 0), ("max_rank", 1), ("min_rank", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is None and name in ("moves", "max_rank"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"rank.{name} is {value!r}; it must be an integer of at least {least}")
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise ValueError(f"rank.max_rank is {self.max_rank}, below rank.min_rank {self.min_rank}; raise it")

    @staticmethod
    def _check_steps(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"rank.{name} is {value!r}; give steps as an integer or a fraction of the run")
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError(f"rank.{name} is {value}; a float is a fraction of the run in [0, 1), steps are integers")
        if value < 0 or (name == "interval" and value == 0):
            raise ValueError(f"rank.{name} is {value}; it must be {'positive' if name == 'interval' else '0 or more'}")

    @classmethod
    def paper(cls, **overrides: Any) -> RankConfig:
        """PE-DyRA to the letter where the paper speaks, and design readings where it is silent; k = 12 (Tables 7-9).

        t_i, Delta_T and t_f differ per task in Tables 7 to 9; as fractions of the run their rows lie around the
        values here. gamma = 0.1 (Table 7, six of eight tasks).
        """
        settings: dict[str, Any] = dict(
            moves=12,
            moves_schedule="constant",
            budget="ranks",
            orth_weight=0.1,
            start="svd",
            init="gaussian",
            new_moments="zero",
        )
        return cls.from_dict({**settings, **overrides})

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> RankConfig:
        """The config with these settings; an unknown name raises ValueError with the nearest known one."""
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(known)}"
                raise ValueError(f"rank.{name} is not a setting{hint}")
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, for JSON."""
        return asdict(self)

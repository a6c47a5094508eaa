"""RankConfig: every choice the method leaves open, in one frozen record that is checked when it is made."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from typing import Any

# Values a string field may take; design decisions behind each are in docs/how_it_works.md.
CHOICES: dict[str, tuple[str, ...]] = {
    "moves_schedule": ("adaptive", "linear", "constant", "cubic"),
    "budget": ("parameters", "ranks"),
    "score_norm": ("mean", "rank", "none"),
    "input_norm": ("mean_square", "rms"),
    "omega": ("gradient", "uniform"),
    "layer_score": ("before", "after"),
    "orth_form": ("norm", "squared"),
    "start": ("lora", "svd"),
    "init": ("orthogonal", "gaussian", "gradient"),
    "expand": ("gradient", "importance", "two_thirds"),
    "prune": ("trial", "score"),
    "score": ("trial", "importance", "loss"),
    "new_moments": ("seed", "zero"),
}


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """Settings of rank adaptation. `RankConfig()` is our default, `RankConfig.paper()` the paper.

    Raises:
        ValueError: a value outside its range, with the value, the rule and the repair.
    """

    __pydantic_config__ = {"use_attribute_docstrings": True}  # for the schema of recipes

    interval: int | float = 0.05
    """Optimizer steps between adjustments (paper: Delta_T); a float below 1 is a fraction of the run, but where triples
    are tried 27 steps at least, or a quarter of what the warm-ups leave: fewer cannot tell a gain from chance."""
    moves: int | None = None
    """Triples moved per adjustment at most (paper: k). Where they are tried first, more are on trial if they belong to
    narrow layers: enough to free the parameters of one triple of the widest. None: a sixth of the total rank where they
    are tried first (`prune` "trial"), else 2 %, the paper's 12 of 576; 0: only observe."""
    moves_schedule: str | None = None
    """k over the window of adjustments: "adaptive", twice what moved last time, a quarter of `moves` at least;
    "constant" (paper), "linear" to 1, or "cubic", k (1 - p^3) (ElaLoRA). None: "adaptive" where triples are tried
    first, else "linear"."""
    initial_warmup: int | float | None = None
    """Steps before the first interval begins (paper: t_i); a float below 1 is a fraction of the run. None: 0 where
    triples are tried first (`prune` "trial"), because nothing is tried before the first look anyway; else 0.05."""
    final_warmup: int | float = 0.25
    """LENGTH of the last phase, without adjustments (paper: t_f); a float below 1 is a fraction of the run."""

    deal: int | float | None = None
    """Step at whose nearest adjustment all ranks are dealt anew, once, in proportion to what each layer's triples save
    of the loss per parameter, by Adam's second moments (`core.allocation.deal_ranks`); a float below 1 is a fraction of
    the run, 0: never (paper). Only with PE-DyRA's own policy. Not where one layer would get more than 2.5 times its
    rank (of fewer than four layers (layers + 1) / 2 times), because such a layer has merely learned earlier than the
    others; nor where some B is not zero at the start (PiSSA, OLoRA, an earlier training, `start="svd"`): what it holds
    is not given away unmeasured. None: 0.1 where triples are tried (`prune` "trial") and the optimizer is of Adam's
    family, or 0."""

    budget: str = "parameters"
    """What is conserved: "parameters" (never above the initial count) or "ranks" (paper: their sum is constant)."""
    min_rank: int = 0
    """No layer falls below this rank (paper: 1)."""
    max_rank: int | None = None
    """No layer grows above this rank; None: only the layer's own width bounds it."""

    alpha: float | None = None
    """Weight of the gradient score against the input score in Alg. 1, step 3. The paper names no value. None: 0.5, but
    0 where triples are turned before their trial (`turn`): Eq. (3) is not defined for turned directions, so alpha would
    have no effect."""
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
    train_e: bool | None = None
    """Whether E is trained. None: with `start="svd"` (paper) only. With start="lora" it stays 1: A and B then learn as
    those of a plain LoRA of the same ranks do, to the last bit (but for roundings while a sketch's probes stand beside
    them), with as many parameters."""
    init: str = "gradient"
    """Direction of a new triple: along the "gradient", "orthogonal" to the layer's rows, or "gaussian" (paper, after
    AdaLoRA). Its contribution starts at zero."""
    expand: str = "gradient"
    """What chooses the layers that grow: "importance", Eq. (7) (paper), "gradient", the loss a new triple would save,
    or "two_thirds", the distance to the ranks of Eq. (8)."""
    prune: str | None = None
    """How triples go: "score", the lowest (paper), or "trial": once a new triple would surely gain something, the
    lowest are switched off in the last third of the next sketch, and go only where a new one would clearly gain more
    than they do. None: "trial" where `expand="gradient"` can measure that, else "score"."""
    score: str | None = None
    """What orders the triples: "importance", Algorithm 1 (paper), or what pruning one costs to second order: "trial",
    h c^2 / 2 of its length c, with the curvature h that earlier trials measured in its layer; "loss", e^2 v / 2 of its
    E where that is trained, else of its row of A, with Adam's second moment v. None: "trial" where there are trials
    (`prune`) and no `alpha` is given, else "importance"."""
    turn: bool = True
    """Try singular directions of a layer's product, not its triples, which share their work and all look needed. A
    layer that loses one is turned first (exact re-orthogonalisation; the function stays), so that it is a triple. With
    `score` "importance" Eq. (6) alone orders them. Not where E is trained."""
    certainty: float = 3.0
    """How many standard errors of a new triple's gain count as noise: it is credited with its square less theirs,
    gain^2 - (certainty error)^2. Where triples are tried, no gain counts that is not larger than chance shows among all
    candidates (`core.noise.chance`) as seldom as a normal value is beyond this many errors; above 4 no look is that
    sure, and nothing is tried."""
    margin: float = 0.25
    """At first, a swap takes a sure gain above the square of this part of what the triples on trial are worth; the part
    rises to 1 over the window. Below 1, because in a network out of balance a triple in the wrong layer does a
    substitute's work, and no single move may look worth making (docs/evidence.md)."""
    patience: int = 4
    """Adjustments in a row without a move after which ranks stay as they are and nothing is observed any more; 0: go on
    to the end of the window; those before the deal do not count. Only with `prune` "trial"."""
    sketch_steps: int = 100
    """Optimizer steps before an adjustment, at most the whole interval, in which gradient directions are sketched
    (init or expand "gradient"). The noise of what is measured falls with their root."""
    sketch_size: int = 8
    """Candidate directions per layer and adjustment."""
    new_moments: str = "zero"
    """Adam's second moment of new rows: "zero" (first updates up to 6x lr, a kick that lets them catch up), or "seed":
    the kept rows' mean (a slow start; with `prune` "score" new triples tend to be pruned again)."""
    fused: bool = False
    """Compute base layer and triples together where that is exact (plain linear base, no dropout, no DoRA): faster,
    in less memory; elsewhere PEFT's own forward runs. Roundings differ, and no gradient of a gradient is there."""
    seed: int = 0
    """Seed of the new triples; they never draw from torch's global generator."""

    def __post_init__(self) -> None:
        self._fill_in()
        self._check_each()
        self._check_together()

    def _fill_in(self) -> None:
        for name, value in vars(self).items():  # NumPy's integers are none that JSON knows
            if isinstance(value, Integral) and not isinstance(value, (bool, int)):
                object.__setattr__(self, name, int(value))
        # What follows from another choice is filled in, so that a config on disk says what was done.
        if self.prune is None:
            object.__setattr__(self, "prune", "trial" if self.expand == "gradient" else "score")
        if self.moves_schedule is None:
            object.__setattr__(self, "moves_schedule", "adaptive" if self.prune == "trial" else "linear")
        if self.initial_warmup is None:
            object.__setattr__(self, "initial_warmup", 0.0 if self.prune == "trial" else 0.05)
        if self.train_e is None:
            object.__setattr__(self, "train_e", self.start == "svd")
        if self.score is None:
            object.__setattr__(self, "score", "trial" if self.prune == "trial" and not self.alpha else "importance")
        if self.alpha is None:
            turned = self.prune == "trial" and self.turn is True and not self.train_e
            object.__setattr__(self, "alpha", 0.0 if turned or self.score == "trial" else 0.5)

    def _check_each(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"rank.{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")
        for name in ("interval", "initial_warmup", "final_warmup", *(("deal",) if self.deal is not None else ())):
            self._check_steps(name, getattr(self, name))
        for name in ("alpha", "beta1", "beta2", "orth_weight", "certainty", "margin"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"rank.{name} is {value!r}; it must be a finite number")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"rank.{name} is {getattr(self, name)}; an EMA coefficient lies in [0, 1)")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"rank.alpha is {self.alpha}; it weighs two scores and lies in [0, 1]")
        if self.orth_weight < 0:
            raise ValueError(f"rank.orth_weight is {self.orth_weight}; a penalty is 0 (off) or positive")
        if self.certainty < 0:
            raise ValueError(f"rank.certainty is {self.certainty}; it counts standard errors: 0 or more")
        if self.margin <= 0:
            raise ValueError(f"rank.margin is {self.margin}; it is a part, above 0 (1: gain at least what is lost)")
        for name in ("omega_ema", "fused", "train_e", "turn"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"rank.{name} is {getattr(self, name)!r}; it must be true or false")
        counts = (("moves", 0), ("max_rank", 1), ("min_rank", 0), ("patience", 0), ("seed", 0))
        for name, least in (*counts, ("sketch_steps", 4), ("sketch_size", 1)):
            value = getattr(self, name)
            if value is None and name in ("moves", "max_rank"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"rank.{name} is {value!r}; it must be an integer of at least {least}")

    def _check_together(self) -> None:
        if self.prune == "trial" and self.expand != "gradient":
            raise ValueError(
                f"rank.prune is 'trial', but rank.expand {self.expand!r} measures no gains to set against it; use "
                f"rank.expand='gradient', or rank.prune='score'"
            )
        if self.score == "trial" and self.prune != "trial":
            raise ValueError(
                "rank.score is 'trial', but with rank.prune 'score' there are no trials; use rank.score='importance'"
            )
        if self.score == "trial" and self.alpha:
            raise ValueError(
                f"rank.alpha is {self.alpha}, but it mixes the scores of Algorithm 1, and rank.score 'trial' asks for "
                f"none; use rank.score='importance', or leave rank.alpha out"
            )
        if self.moves_schedule == "adaptive" and self.prune != "trial":
            raise ValueError(
                "rank.moves_schedule is 'adaptive', but with rank.prune 'score' as many move as may; use 'linear' or "
                "'constant'"
            )
        if self.start == "svd" and not self.train_e:
            raise ValueError("rank.train_e is false, but rank.start 'svd' starts at E = 0: nothing would be learned")
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
        """PE-DyRA as the paper has it, and design readings where it is silent; k = 12 (Tables 7-9).

        Two are not as written: `score_norm` is "mean", for the literal "none" lets one score decide alone, and
        `orth_form` is "norm", AdaLoRA's, for which the weights were tuned; "squared" is Eq. (2).
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
            expand="importance",
            prune="score",
            min_rank=1,
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

"""RankSettings has the fields of `PeDyra` and of its ablations. It loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from pedyra.allocate.allocation import Budget
from pedyra.allocate.schedule import check_count, check_fields, check_number, check_word
from pedyra.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

# The words that a field may take; docs/paper_read.md says why.
Start = Literal["svd", "lora"]
ScoreNorm = Literal["mean", "none"]
Omega = Literal["gradient", "uniform"]
InputNorm = Literal["mean_square", "rms"]
OrthForm = Literal["norm", "squared"]
CHOICES: dict[str, tuple[str, ...]] = {
    **{"budget": get_args(Budget), "start": get_args(Start), "score_norm": get_args(ScoreNorm)},
    **{"omega": get_args(Omega), "input_norm": get_args(InputNorm), "orth_form": get_args(OrthForm)},
}


@dataclass(frozen=True, kw_only=True)
class RankSettings:
    """The settings of every method that scores triples: when ranks move, how many, and how triples are scored.

    The defaults are the form to take: scores and moves are the paper's, the start, its learning rate and its alpha are
    LoRA's, Eq. (2) is off, since its gradient, through Adam, outweighs the task's (research/orthogonality.md), and
    adjustments are half as many. `as_published` is the paper to the letter. Its t_i, Delta_T and t_f are medians of
    their parts of the run over the twelve different schedules of Tables 7 to 9 (T being epochs times batches, t_i / T
    is 0.02 to 0.18, Delta_T / T 0.005 to 0.044 and t_f / T 0.32 to 0.92). What the paper leaves open is read as
    docs/paper_read.md says.

    Raises:
        ValueError: a value outside its range, with the value, the rule and the repair.
    """

    # Algorithm 2: when ranks move, and how many.
    interval: int | float = 0.05
    """Delta_T: optimizer steps between adjustments, of PE-DyRA 2 at least; a float below 1 is a fraction of the run. A
    new triple needs steps: at the paper's median of 0.023 fewer than half of them stay in a run of 150."""
    moves: int | None = None
    """k: triples pruned per adjustment at most. As many are added, or, with `budget` "parameters", as many as fit.
    None: 2 % of the total rank, as the paper's 12 of 576 are. 0: ranks stay as they are, and only scores are
    recorded."""
    initial_warmup: int | float = 0.06
    """t_i: steps before the first interval begins; a float below 1 is a fraction of the run."""
    final_warmup: int | float = 0.64
    """t_f: the LENGTH of the last phase, without adjustments; a float below 1 is a fraction of the run."""
    budget: Budget = "ranks"
    """What an adjustment conserves: the sum of the "ranks" (paper), or the number of "parameters", which never exceeds
    the initial one: a rank has 2.5 times more of them in a feed-forward layer than in attention."""
    min_rank: int = 0
    """No layer falls below this rank; the paper sets it to 1."""
    max_rank: int | None = None
    """No layer grows above this rank; None: only the layer's own width bounds it."""

    # Algorithm 1 and Eqs. (3) to (7): how triples and layers are scored.
    alpha: float = 0.5
    """alpha: weight of the gradient score (Eq. 4) against the input score (Eq. 6). The paper names no value. 1 needs no
    forward hooks, 0 no averages of the parameters' size."""
    beta1: float = 0.85
    """beta_1: EMA of the sensitivity, Eq. (3), and of the input energy. AdaLoRA's value; the paper names none."""
    beta2: float = 0.85
    """beta_2: EMA of the uncertainty, Eq. (3). AdaLoRA's value; the paper names none."""
    score_norm: ScoreNorm = "mean"
    """Before mixing, divide each score by its mean over all triples ("mean"), or mix it as it is ("none", literal; then
    the input score decides alone, see docs/paper_read.md)."""
    omega: Omega = "gradient"
    """omega, the weights of A, E, B in Eq. (4): "gradient" is Eq. (5), "uniform" the plain sum of AdaLoRA."""
    input_norm: InputNorm = "mean_square"
    """||X_k|| of Eq. (6), of each input feature: the mean square that the paper writes, or its root ("rms"), the norm
    that it names, under which layers of a decoder with huge activations weigh less (research/ranks.md)."""

    # Eqs. (1) and (2): how triples begin, and are held apart.
    start: Start = "lora"
    """"lora": E = 1, not trained, A and B as PEFT made them, an identity on any LoRA, at LoRA's own rate and alpha;
    "svd": A, B ~ N(0, 0.02^2) and a trained E = 0 (Eq. 1; AdaLoRA's), or the singular triples of an adapter that
    already holds an update (PiSSA), which wants about ten times LoRA's rate."""
    orth_weight: float = 0.0
    """gamma: the coefficient of Eq. (2), a gradient beside the task's; 0 switches it off. The paper has 0.1 on most
    tasks, at which Adam follows Eq. (2) and hardly learns."""
    orth_form: OrthForm = "norm"
    """Eq. (2) as AdaLoRA's code has it, the un-squared norm averaged over the 2 L matrices ("norm"; the published
    weights were tuned for it), or as it is written ("squared")."""

    seed: int = 0
    """Seed of the new triples; they never draw from torch's global generator."""

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            check_word(name, getattr(self, name), allowed)
        check_fields(self)
        for name, least in (("moves", 0), ("max_rank", 1)):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least)
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise UserError(f"max_rank is {self.max_rank}, below min_rank {self.min_rank}; raise it")
        check_number("alpha", self.alpha, least=0)
        if self.alpha > 1:
            raise UserError(f"alpha is {self.alpha}; it weighs two scores and lies in [0, 1]")
        for name in ("alpha", "beta1", "beta2", "orth_weight"):  # 1 is 1.0 to what computes with it
            object.__setattr__(self, name, float(getattr(self, name)))

    @classmethod
    def as_published(cls, **changes: Any) -> Self:
        """Return the method as its paper has it, to the letter: Eq. (1) from E = 0, Eq. (2) with gamma = 0.1 as in six
        of the eight tasks of Table 7, k = 12, and no layer below rank 1. `changes` are further fields."""
        published: dict[str, Any] = dict(start="svd", orth_weight=0.1, min_rank=1, moves=12, interval=0.023)
        return cls(**{**published, **changes})

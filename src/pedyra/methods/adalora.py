"""AdaLoRA (Zhang et al. 2023): as PEFT has it, called at the right moments, and `adalora-svd`, the same algorithm with
ranks that really go: parameters, gradients and moments shrink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import AdaLoraConfig, PeftModel
from pydantic import Field
from torch import nn

from pedyra.allocate.allocation import RankPlan, Scores, layer_means, lowest_to_free, make_plan, spent
from pedyra.allocate.schedule import resolve_schedule
from pedyra.errors import UserError
from pedyra.methods.method import Adaptation, Hooks, Method, Request, Running, Settings, adaptive
from pedyra.pe_dyra.scored import ScoredMethod, ScoredSituation

NO_PENALTY = 1e-300
"""A weight that is 0 in any tensor's precision; peft 0.19 refuses 0 itself."""
RANK_SETTINGS: dict[str, Any] = dict(
    alpha=1.0, omega="uniform", score_norm="none", start="svd", budget="ranks", orth_weight=0.1
)
"""Fields of RankSettings that are AdaLoRA's scores and start; budget and orthogonality weight are defaults."""


class AdaLoraSettings(Settings):
    """Settings of AdaLoRA."""

    initial_rank: int | None = Field(None, ge=1)
    """Rank of each layer at the start. None: 1.5 lora.r, the authors' convention."""
    final_rank: int | None = Field(None, ge=1)
    """Average rank at the end. None: lora.r. With initial_rank lora.r, a run never has more than LoRA's, but for E."""


def first_and_last_rank(settings: AdaLoraSettings, r: int) -> tuple[int, int]:
    """Return the rank that a run at `lora.r` starts with, and the average at its end; ValueError unless the first is
    higher."""
    initial = max(r + 1, round(1.5 * r)) if settings.initial_rank is None else settings.initial_rank
    final = r if settings.final_rank is None else settings.final_rank
    if initial <= final:
        where = f"lora.r ({r})" if settings.final_rank is None else f"method_settings.final_rank ({final})"
        raise UserError(
            f"method_settings.initial_rank is {initial}, but AdaLoRA prunes from it down to {where}; raise it, or use "
            f"method lora for a constant rank"
        )
    return initial, final


def prepare(request: Request, settings: AdaLoraSettings) -> Adaptation:
    """Make PEFT's AdaLoRA, from 1.5 lora.r to lora.r per layer on average, or as `AdaLoraSettings` say.

    `rank.initial_warmup`, `rank.interval` and `rank.final_warmup` are tinit, deltaT and tfinal. `rank.beta1`,
    `rank.beta2` and `rank.orth_weight` (0.1, as in the authors' scripts; PEFT's own 0.5 is in none) are AdaLoRA's.
    Masked ranks stay in memory and come back between two masks: it is a PEFT property, as are the trainable parameters
    of the initial rank all along. The penalty is left out while evaluating, so that an evaluation loss is the task's.
    Raises ValueError: DoRA, rsLoRA or another start, which PEFT's AdaLoRA ignores or refuses.
    """
    request.refuse_lora("PEFT's AdaLoRA does not have it", "use_dora", "use_rslora", "init")
    ranks = request.rank_settings(open_fields=("beta1", "beta2", "orth_weight"), orth_weight=0.1)
    lora = request.lora
    initial, final = first_and_last_rank(settings, lora.r)
    config = AdaLoraConfig(
        task_type=lora.task_type,
        init_r=initial,
        target_r=final,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        exclude_modules=lora.exclude_modules,
        bias=lora.bias,
        modules_to_save=lora.modules_to_save,
        beta1=ranks.beta1,
        beta2=ranks.beta2,
        orth_reg_weight=ranks.orth_weight or 0.0,
        total_step=1,  # until the run begins
    )
    model = request.with_adapter(config)
    schedule = {name: getattr(ranks, name) for name in ("initial_warmup", "interval", "final_warmup")}
    refused = {
        "load_best_model_at_end": "PEFT cannot load a pruned AdaLoRA adapter into the model that trained it; set it to "
        "false, or use method adalora-svd"
    }
    if ranks.orth_weight:
        refused["label_smoothing_factor"] = (
            "it computes its own loss, without AdaLoRA's orthogonality term; set it to 0, or rank.orth_weight to 0"
        )
    return Adaptation(model=model, hooks=AdaLoraHooks(model, schedule), refused=refused)


class AdaLoraHooks(Hooks):
    """PEFT's allocator is called after every optimizer step, as in the authors' trainer.

    Args:
        model: a PeftModel with an AdaLoRA adapter "default".
        schedule: initial_warmup, interval and final_warmup, in steps or fractions of the run.
    """

    def __init__(self, model: PeftModel, schedule: dict[str, Any]) -> None:
        self.model, self.schedule = model, schedule
        self.config: Any = model.peft_config["default"]
        self.weight = self.config.orth_reg_weight or NO_PENALTY
        """The weight of the orthogonality term in the loss of a micro-batch."""
        self._without_penalty_in_evaluation()

    def begin(self, run: Running) -> None:
        # Where the model divides its own loss by the tokens of all micro-batches, PEFT adds the term to each.
        self.weight = self.config.orth_reg_weight / run.micro_batches or NO_PENALTY
        schedule = resolve_schedule(run.total_steps, **self.schedule)
        self.config.total_step = schedule.total_steps
        self.config.tinit, self.config.tfinal = schedule.initial_warmup, schedule.final_warmup
        self.config.deltaT = schedule.interval

    def stepped(self, step: int, *, skipped: bool = False) -> None:
        tuner: Any = self.model.base_model
        if skipped:
            # Infinite gradients: in PEFT's averages they would stay, and nothing would be masked.
            for name, parameter in self.model.named_parameters():
                if "lora_" in name and parameter.grad is not None:
                    parameter.grad.zero_()
        tuner.update_and_allocate(step + 1)

    def _without_penalty_in_evaluation(self) -> None:
        weight = self.config.orth_reg_weight

        def before(module: nn.Module, args: Any) -> None:
            self.config.orth_reg_weight = self.weight if module.training else NO_PENALTY

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self.config.orth_reg_weight = weight  # as it was asked for, and is saved

        self.model.base_model.register_forward_pre_hook(before)
        self.model.base_model.register_forward_hook(after)


def cubic_budget(first: int, last: int, part: float) -> int:
    """Return b(t) between b_0 and b_T when `part` of the window is over: int(b_T + (b_0 - b_T) (1 - part)^3)."""
    return int(last + (first - last) * (1 - part) ** 3)


@dataclass(frozen=True, kw_only=True)
class Prune(ScoredMethod):
    """A run shrinks from a uniform rank `initial` to the budget of a uniform rank `final`: the lowest triples of all
    layers go, the same amount at every adjustment or, `cubic`, until AdaLoRA's b(t) is met."""

    initial: int
    final: int
    cubic: bool = False

    def plan(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        units = now.units
        first, last = self.initial * sum(units.values()), self.final * sum(units.values())
        if self.cubic:
            budget = cubic_budget(first, last, 1.0 if now.is_last else now.elapsed)
        else:
            budget = last + int((first - last) * (1 - now.part_done))
        per_unit = {name: [value / units[name] for value in values] for name, values in scores.items()}
        pruned = lowest_to_free(per_unit, units, spent(now.ranks, units) - budget, now.min_rank)
        return make_plan(scores, pruned, {}, layer_means(scores))


def prepare_svd(request: Request, settings: AdaLoraSettings) -> Adaptation:
    """Make AdaLoRA from 1.5 lora.r to the budget of lora.r, or as `AdaLoraSettings` say, in ranks (or `rank.budget`).

    Scores are AdaLoRA's: sensitivity times uncertainty, the mean over A's row and B's column plus E, and one global
    order. A layer may lose all of its ranks. A, B ~ N(0, 0.02^2), E = 0; the orthogonality term is the un-squared
    norm averaged over the matrices, weight 0.1 (the scripts use 0.3 for RTE and STS-B). Scaling is alpha / initial
    rank for the whole run, alpha being `lora.alpha`.

    Departs from the authors' code, and why: pruned triples are removed with their moments, where theirs are only
    zeroed and come back between two maskings; the scores read the weight before the optimizer step, theirs after it
    (its gradient belongs to the former); b_T is reached at the last adjustment, theirs at T - t_f, and no later one
    follows here; the scaling lacks their 1e-5 in the denominator.
    """
    request.refuse_lora("AdaLoRA defines its own start and scaling", "init", "use_rslora")
    config = request.rank_settings(
        open_fields=("beta1", "beta2", "orth_weight", "budget", "min_rank"),
        **RANK_SETTINGS,
        min_rank=0,
    )
    initial, final = first_and_last_rank(settings, request.lora.r)
    model = request.with_lora(r=initial)
    return adaptive(model, Prune(**config.to_dict(), initial=initial, final=final, cubic=True))


METHOD = Method(
    "adalora",
    "AdaLoRA (Zhang et al. 2023), PEFT's own: masked ranks",
    prepare,
    AdaLoraSettings,
    resumable=False,
    moves_ranks=True,
    peft_type="ADALORA",
)
SVD = Method("adalora-svd", "AdaLoRA with ranks that are removed", prepare_svd, AdaLoraSettings, moves_ranks=True)

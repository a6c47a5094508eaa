"""AdaLoRA (Zhang et al. 2023) with ranks that really go, so that parameters, gradients and moments shrink; and as PEFT
has it, called at the right moments."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from pedyra.allocate.allocation import Budget, RankPlan, Scores
from pedyra.allocate.contract import Beginning, Training, Work
from pedyra.allocate.scored import ScheduledMethod, ScoredSituation
from pedyra.errors import UserError
from pedyra.methods.sizes import Shrinking
from pedyra.methods.slots import refuse_lora

NO_PENALTY = 1e-300
"""A weight that is 0 in any tensor's precision; peft 0.19 refuses 0 itself."""
ON_PEFT = ("interval", "initial_warmup", "final_warmup", "seed")
"""Fields of `AdaLora` that a model of PEFT's AdaLoraConfig leaves open."""


@dataclass(frozen=True, kw_only=True)
class AdaLora(Shrinking, ScheduledMethod):
    """AdaLoRA (Zhang et al. 2023): ranks are pruned from the LoRA's r down to `final_rank`, by one global order.

    Scores are AdaLoRA's: sensitivity times uncertainty, the mean over A's row and B's column plus E. A layer may lose
    all of its ranks. A, B ~ N(0, 0.02^2), E = 0. Scaling is alpha / r for the whole run. The authors begin with 1.5
    times the final rank.

    A model that was made with PEFT's AdaLoraConfig is taken too. Its own `update_and_allocate`, which masks ranks, is
    called after every step, with the schedule of the run; all else is its config's, init_r and target_r among it.

    Departs from the authors' code, and why: pruned triples are removed with their moments, where theirs are only
    zeroed and come back between two maskings; the scores read the weight before the optimizer step, theirs after it
    (its gradient belongs to the former); b_T is reached at the last adjustment, theirs at T - t_f, and no later one
    follows here; the scaling lacks their 1e-5 in the denominator. Raises ValueError: a LoRA that begins at the final
    rank or below; rsLoRA or another start.
    """

    beta1: float = 0.85
    """EMA of the sensitivity."""
    beta2: float = 0.85
    """EMA of the uncertainty."""
    orth_weight: float = 0.1
    """Weight of the orthogonality term, the un-squared norm averaged over the matrices. The authors' scripts have 0.3
    for RTE and STS-B."""
    budget: Budget = "ranks"
    """What is pruned down to that of the final rank: the sum of the "ranks", or the number of "parameters"."""

    min_rank = 0

    @classmethod
    def at_budget(cls, rank: int) -> Beginning:
        return Beginning(max(rank + 1, round(1.5 * rank)), {"final_rank": rank})

    def install(self, model: nn.Module, adapter: str = "default", training: Training | None = None) -> Work:
        config: Any = getattr(model, "peft_config", {}).get(adapter)
        if getattr(config, "peft_type", None) == "ADALORA":
            self._check_peft(config)
            return MaskedRanks(model, adapter, self)
        refuse_lora(model, adapter, "AdaLoRA")
        return super().install(model, adapter)

    def plan(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        """Follow AdaLoRA's b(t) = int(b_T + (b_0 - b_T) (1 - p)^3), p being the part of the window that is over."""
        return self.prune((1 - (1.0 if now.is_last else now.elapsed)) ** 3, scores, now)

    def _check_peft(self, config: Any) -> None:
        for each in fields(self):
            if each.name not in ON_PEFT and (value := getattr(self, each.name)) != each.default:
                raise UserError(
                    f"{each.name} is {value!r}, but on an adapter of PEFT's AdaLoraConfig it is the config's; say it "
                    f"there (target_r, beta1, beta2, orth_reg_weight)"
                )
        if config.init_r <= config.target_r:
            raise UserError(
                f"the AdaLoraConfig has init_r={config.init_r}, but AdaLoRA prunes from it down to target_r="
                f"{config.target_r}; raise it"
            )


class MaskedRanks(Work):
    """PEFT's allocator is called after every optimizer step, as in the authors' trainer.

    Masked ranks stay in memory and come back between two masks: it is a PEFT property, as are the trainable parameters
    of the initial rank all along. The penalty is left out while evaluating, so that an evaluation loss is the task's.
    """

    resumable = False

    def __init__(self, model: Any, adapter: str, method: AdaLora) -> None:
        self.model, self.method = model, method
        self.config: Any = model.peft_config[adapter]
        self.refused = {
            "load_best_model_at_end": "PEFT cannot load a pruned AdaLoRA adapter into the model that trained it; set "
            "it to false, or begin with a LoraConfig"
        }
        if self.config.orth_reg_weight:
            self.refused["label_smoothing_factor"] = (
                "it computes its own loss, without AdaLoRA's orthogonality term; set it to 0, or the AdaLoraConfig's "
                "orth_reg_weight"
            )
        self.weight = self.config.orth_reg_weight or NO_PENALTY
        """The weight of the orthogonality term in the loss of a micro-batch."""
        weight = self.config.orth_reg_weight

        def before(module: nn.Module, args: Any) -> None:
            self.config.orth_reg_weight = self.weight if module.training else NO_PENALTY

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self.config.orth_reg_weight = weight  # as it was asked for, and is saved

        model.base_model.register_forward_pre_hook(before)
        model.base_model.register_forward_hook(after)

    def begin(self, total_steps: int, micro_batches: int) -> None:
        # Where the model divides its own loss by the tokens of all micro-batches, PEFT adds the term to each.
        self.weight = self.config.orth_reg_weight / micro_batches or NO_PENALTY
        schedule = self.method.schedule(total_steps)
        self.config.total_step = schedule.total_steps
        self.config.tinit, self.config.tfinal = schedule.initial_warmup, schedule.final_warmup
        self.config.deltaT = schedule.interval

    def stepped(self, step: int, *, skipped: bool = False) -> None:
        if skipped:
            # Infinite gradients: in PEFT's averages they would stay, and nothing would be masked.
            for name, parameter in self.model.named_parameters():
                if "lora_" in name and parameter.grad is not None:
                    parameter.grad.zero_()
        self.model.base_model.update_and_allocate(step + 1)

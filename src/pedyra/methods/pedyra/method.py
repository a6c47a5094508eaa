"""Method pedyra: start at the rank you would have taken, end with the smallest adapter that does the job."""

from __future__ import annotations

from dataclasses import dataclass

from pedyra.allocate.contract import Run, Situation
from pedyra.allocate.schedule import Schedule, resolve_schedule
from pedyra.config import RankConfig
from pedyra.methods.adapter import adaptive, with_lora
from pedyra.methods.method import Adaptation, Request
from pedyra.methods.pedyra.run import FitRun
from pedyra.methods.pedyra.target import TargetRun

LEAST_INTERVAL = 10
"""Steps between adjustments: 8 batches answer a question."""
FIRST = {False: 0.6, True: 0.15}
"""Part of the run before the first interval. What is cut while much is left to learn makes the rest learn slower; on
the way to a `target_rank` (True) steps to get used to being narrow are worth more (docs/decisions.md)."""


def prepare(request: Request) -> Adaptation:
    """`request.rank` has all that users choose. It goes on top of DoRA and QLoRA (`lora.use_dora`,
    `model.quantization`)."""
    config = RankConfig.from_dict({"seed": request.seed, **request.rank})
    return adaptive(with_lora(request), config, Fit())


@dataclass(frozen=True)
class Fit:
    """Fit in the run: a `RankMethod`."""

    needs_history, compiles = True, False

    def trains_e(self, config: RankConfig) -> bool:
        return False

    def most_moves(self, config: RankConfig, total_rank: int) -> int:
        return total_rank if config.moves is None else config.moves

    def schedule(self, config: RankConfig, total_steps: int) -> Schedule:
        return resolve_schedule(
            total_steps,
            initial_warmup=config.initial_warmup or FIRST[config.target_rank is not None],
            interval=config.interval,
            final_warmup=config.final_warmup,
            least_interval=LEAST_INTERVAL,
        )

    def check(self, run: Run, now: Situation) -> None:
        if any(layer.a.origin is not None for layer in run.layers):
            raise ValueError(
                "method pedyra cuts directions, but the adapter began as a part of the weight (PiSSA), and they hold "
                "what the base knows; use another start, method pedyra-paper, or cut it after training: pedyra fit"
            )
        highest, target = max(now.ranks.values()), run.config.target_rank
        if target is not None and target >= highest:
            raise ValueError(
                f"rank.target_rank is {target}, and no layer starts above {highest}, so nothing is left to cut; raise "
                f"lora.r (4 times the target does well), or lower it"
            )

    def start(self, run: Run) -> FitRun:
        return FitRun(run) if run.config.target_rank is None else TargetRun(run)

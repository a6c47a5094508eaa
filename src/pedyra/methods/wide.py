"""Begin wide, end narrow: a LoRA of higher rank, cut early in the run to the size that was given.

While it trains, every layer's Gramians say what its directions are worth (`pedyra.fitting.worth`). Three cuts, each of
which leaves the same part, lead to the number of parameters of a LoRA of the rank that was given, placed where they are
worth most. A cut turns a layer's triples to its balanced directions and removes the last ones for good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pedyra.allocate.allocation import layer_means, make_plan
from pedyra.allocate.contract import Decision, MethodRun, RankMethod, Run, Situation
from pedyra.allocate.optimizer_state import turn_state
from pedyra.allocate.schedule import Schedule, check_count, check_steps, resolve_schedule
from pedyra.errors import UserError
from pedyra.fitting.curve import num_parameters, removal_order, whole
from pedyra.fitting.gramians import Calibration, Gramians
from pedyra.fitting.worth import Balance
from pedyra.lora.layer import AdaptedLayer, holds_triples
from pedyra.methods.method import Adaptation, Method, Request, adaptive

TIMES = 4
"""Times the final rank that a run begins with: what the results were measured with, but those of planted ranks (6)."""
CUTS = 3
"""Cuts of a run, each of which leaves the same part: what every result was measured with."""
WINDOW = 40
"""Steps that are measured before a cut at most; fewer where adjustments are nearer to each other."""
LEAST_INTERVAL = 10
"""Steps between two cuts at least: slopes of fewer say little."""


@dataclass(frozen=True, kw_only=True)
class Wide(RankMethod):
    """Begin at the adapter's own rank, end with the parameters of a LoRA of `rank`: `adapt(trainer, Wide(rank=2))` on a
    LoRA of r = 8. The class of the config is the method.

    Raises:
        ValueError: a value outside its range, with the value, the rule and the repair.
    """

    rank: int
    """The run ends with the number of parameters of a LoRA of this rank; begin with about four times as much."""
    interval: int | float = 0.05
    """Optimizer steps between cuts, 10 at least; a float below 1 is a fraction of the run."""
    initial_warmup: int | float = 0.15
    """Steps before the first interval begins; a float below 1 is a fraction of the run. On other letters, r = 8 to 2,
    the loss is 1.861 with 0.15 and 1.872 with 0.30."""
    final_warmup: int | float = 0.1
    """LENGTH of the last phase, without cuts; a float below 1 is a fraction of the run."""

    start = "lora"
    trains_e = False
    seed = 0  # nothing is drawn
    budget = "size"
    compiles = False

    def __post_init__(self) -> None:
        check_count("rank", self.rank, 1)
        for name in ("interval", "initial_warmup", "final_warmup"):
            check_steps(name, getattr(self, name), least=1 if name == "interval" else 0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def schedule(self, total_steps: int) -> Schedule:
        return resolve_schedule(
            total_steps,
            initial_warmup=self.initial_warmup,
            interval=self.interval,
            final_warmup=self.final_warmup,
            least_interval=LEAST_INTERVAL,
        )

    def check(self, run: Run, now: Situation) -> None:
        """Raise ValueError where what is cut would be a part of the base weight."""
        if any(layer.a.origin is not None for layer in run.layers):
            raise UserError(
                "Wide cuts directions, but the adapter began as a part of the weight (PiSSA), and its directions hold "
                "what the base knows; use another start, or PeDyra(), or cut it after training: pedyra fit"
            )

    def begin(self, run: Run) -> WideRun:
        return WideRun(self, run)


class WideRun(MethodRun):
    """Begin wide, end narrow, in one run."""

    def __init__(self, config: Wide, run: Run) -> None:
        self.config, self.run, self.layers = config, run, {layer.name: layer for layer in run.layers}
        self.parameters = {name: layer.direction_parameters for name, layer in self.layers.items()}
        self.window = min(WINDOW, run.schedule.interval)
        self.skipped_steps, self.cuts = 0, 0
        self.gramians: Gramians | None = None
        """While measuring."""

    @property
    def target(self) -> int:
        """The number of parameters to end with."""
        return self.config.rank * sum(self.parameters.values())

    @property
    def settled(self) -> bool:  # type: ignore[override]
        return self.cuts >= CUTS

    def observes(self, step: int) -> bool:
        return self.gramians is not None

    def prepare(self, step: int) -> None:
        adjustment = self.run.schedule.next_adjustment(step + 1)
        measures = adjustment is not None and adjustment - step <= self.window and not self.settled
        if measures and self.gramians is None:
            self._measure()
        elif not measures and self.gramians is not None:
            self._stop()

    def _measure(self) -> Gramians:
        average = self.run.average
        total = None if average.processes == 1 else lambda part: average(part) * average.processes
        self.gramians = gramians = Gramians({name: layer.a.A for name, layer in self.layers.items()}, total)
        for name, layer in self.layers.items():
            layer.a.observer = gramians.observer(name)
        return gramians

    def _stop(self) -> None:
        for layer in filter(holds_triples, self.run.layers):  # not deleted since, nor detached
            layer.a.observer = None
        self.gramians = None

    def before_step(self, step: int, loss_scale: float) -> None:
        if step == 1:  # a run that is resumed may have been cut to its end
            self._check_wide()
        if self.gramians is not None:
            self.gramians.close(None, loss_scale)

    def _check_wide(self) -> None:
        """Raise ValueError where nothing can be cut."""
        start = sum(layer.parameters for layer in self.run.layers)
        if start <= self.target:
            raise UserError(
                f"Wide ends with the {self.target:,} parameters of a LoRA of rank {self.config.rank}, and this one "
                f"starts with {start:,}, so nothing is left to cut; raise the adapter's r "
                f"({TIMES * self.config.rank} does well), or lower rank"
            )

    def skip_step(self) -> None:
        if self.gramians is not None:
            self.gramians.drop_step()

    def decide(self, now: Situation) -> Decision | None:
        if self.gramians is None or self.gramians.blocks < 2:
            return None
        unseen = self.gramians.unseen()
        if len(unseen) == len(self.layers):  # no label, no finite loss: a window in which nothing was trained
            return None
        self._check_seen([name for name in unseen if self.layers[name].rank])
        found = self.gramians.calibration(self.parameters)
        self.skipped_steps += found.skipped
        self._stop()
        return self._cut(found, sum(step >= now.step for step in self.run.schedule.adjustments))

    def _check_seen(self, unseen: list[str]) -> None:
        """Raise ValueError for a layer that was not seen: what it is worth is unknown, and not zero."""
        if unseen:
            raise UserError(
                f"Wide saw no token in {unseen[0]}, so what its directions are worth is unknown: it is an expert that "
                f"no token reached, or something reads its weights and does not call it (a fused kernel of unsloth or "
                f"axolotl, torch.compile); train plain LoRA and cut it afterwards: pedyra fit FOLDER"
            )

    def _cut(self, found: Calibration, left: int) -> Decision:
        """Make the next of `CUTS` cuts, or of as many as there are adjustments left; each leaves the same part."""
        ranks, still = whole(found), num_parameters(found, whole(found))
        wanted = still * (self.target / still) ** (1 / min(CUTS - self.cuts, left))
        for name, rank in removal_order(found):
            if still > max(self.target, round(wanted)):
                ranks[name] = rank
                still -= self.parameters[name]
        self.cuts += 1
        pruned = {}
        for name, measured in found.layers.items():
            if ranks[name] < measured.rank:
                turn_layer(self.layers[name], self.run.optimizer, balanced_turn(measured.basis, self.layers[name]))
                pruned[name] = tuple(range(ranks[name], measured.rank))
        increases = {name: layer.increases.tolist() for name, layer in found.layers.items()}
        plan = make_plan(increases, pruned, {}, layer_means(increases, pruned))
        return Decision(plan=plan, scores=increases)

    def restart(self, step: int) -> None:
        self._stop()

    def describe(self) -> dict[str, Any]:
        return {"target": self.target}

    def outcome(self, now: Situation) -> str:
        have = sum(rank * self.parameters[name] for name, rank in now.ranks.items())
        size = f"a LoRA of rank {self.config.rank} ({self.target:,} parameters)"
        if have <= self.target:
            return f"it has the size of {size}"
        return (
            f"the size of {size} was not reached: {self.cuts} of {CUTS} cuts were made, and {have:,} parameters are "
            f"left; train on, or cut it now: pedyra fit --parameters {self.target}"
        )

    def tensors(self) -> dict[str, Tensor]:
        if self.gramians is None:
            return {}
        return self.gramians.tensors()

    def values(self) -> dict[str, Any]:
        return {"cuts": self.cuts, "skipped_steps": self.skipped_steps}

    def load(self, step: int, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.cuts, self.skipped_steps = values["cuts"], values["skipped_steps"]
        if any(name.startswith("P.") for name in tensors):
            self._measure().load(tensors)

    def release(self) -> None:
        self._stop()


def balanced_turn(basis: Balance, layer: AdaptedLayer) -> Tensor:
    """W `(r, r)` that turns a layer to its balanced directions, each row of A as long as rows are now on average.

    Adam's steps are as large for every element whatever its size, so lengths decide how fast a direction turns.
    """
    A = layer.a.A.detach().cpu().double()
    lengths = (basis.T @ A).norm(dim=1)
    mean = A.norm(dim=1).mean()
    factors = torch.where(lengths > 1e-12 * mean, mean / lengths, torch.ones_like(lengths))
    return factors[:, None] * basis.T


@torch.no_grad()
def turn_layer(layer: AdaptedLayer, optimizer: Optimizer, W: Tensor) -> None:
    """A becomes W A and B becomes B W^-1, and their moments turn too. W `(r, r)` is on the processor, since not every
    device has its float64. E must be 1."""
    inverse = torch.linalg.inv_ex(W).inverse
    A, B = layer.a.A, layer.b.weight
    A.copy_(W @ A.to(W))
    B.copy_(B.to(W) @ inverse)
    turn_state(optimizer, A, inverse.T, dim=0)  # a gradient of A turns against A,
    turn_state(optimizer, B, W, dim=1)  # and one of B with it


def prepare(request: Request) -> Adaptation:
    """Begin at four times lora.r, end with the parameters of lora.r; the scaling is that of lora.r throughout.

    Of `request.rank` it takes the schedule. It goes on top of DoRA and QLoRA (`lora.use_dora`, `model.quantization`).
    """
    r, alpha = request.lora.r, request.lora.lora_alpha
    times = math.sqrt(TIMES) if request.lora.use_rslora else TIMES  # whose scaling is alpha / sqrt(r)
    names = ("interval", "initial_warmup", "final_warmup")
    given = {name: value for name, value in request.rank.items() if name in names}
    model = request.with_lora(r=TIMES * r, lora_alpha=times * alpha)
    return adaptive(model, Wide(**{"rank": r, **given}))


METHOD = Method("wide", "begins at 4 lora.r, is cut early to lora.r's parameters", prepare, moves_ranks=True)

"""Our default method: what a new triple gains and what an old one is worth are both measured before ranks move."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pedyra.allocate.allocation import Scores, layer_means, make_plan
from pedyra.allocate.checks import check_movable, check_room
from pedyra.allocate.contract import Closure, Decision, Run, Situation
from pedyra.allocate.optimizer_checks import check_turnable, has_second_moments
from pedyra.allocate.schedule import Schedule, margin_at, moves_at
from pedyra.config import RankConfig
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.resize import NewTriples, Replacement
from pedyra.methods.new_triples import triples_along
from pedyra.methods.paper import two_thirds_log_variance
from pedyra.methods.pedyra.reassignment import reassign, reassignment_step
from pedyra.methods.pedyra.settings import Settings
from pedyra.methods.pedyra.sketching import Sketching, schedule_of, too_short_to_try
from pedyra.methods.pedyra.swaps import Curvature, Gain, Trials, curvatures, least_gain, plan_swaps
from pedyra.methods.pedyra.trials import choose, known_lengths, predicted_losses
from pedyra.methods.pedyra.turning import turn_layer

MOVED = 1 / 6
"""k as a part of the total rank, where the config leaves it open: finds the planted ranks in time (docs/results.md)."""


@dataclass(frozen=True)
class Pedyra:
    """The default method: a `RankMethod`."""

    settings: Settings = Settings()
    needs_history, compiles = False, True

    def trains_e(self, config: RankConfig) -> bool:
        return config.start == "svd"

    def most_moves(self, config: RankConfig, total_rank: int) -> int:
        return max(1, round(MOVED * total_rank)) if config.moves is None else config.moves

    def schedule(self, config: RankConfig, total_steps: int) -> Schedule:
        return schedule_of(config, total_steps)

    def check(self, run: Run, now: Situation) -> None:
        check_movable(now)
        check_room(run.layers, run.config)
        self.reassignment_step(run, after=0)

    def reassignment_step(self, run: Run, after: int) -> int | None:
        """The adjustment after step `after` at which all ranks are assigned anew; None where there is none."""
        return reassignment_step(run.layers, run.optimizer, self.settings, run.config, run.schedule, after=after)

    def start(self, run: Run) -> PedyraRun:
        return PedyraRun(self, run)


@dataclass
class LastAdjustment:
    """What an adjustment leaves for the next one."""

    moved: int = 0
    """Triples that came, but by a reassignment."""
    sure: int = 0
    """Candidates that chance does not explain."""
    born: dict[str, int] = field(default_factory=dict)
    """Layer -> triples that came; they are its last rows, while its rank is that of `ranks`."""
    ranks: dict[str, int] = field(default_factory=dict)
    promising: list[str] = field(default_factory=list)
    """Layers with such a candidate."""


class PedyraRun:
    """The default method in one run: a `MethodRun`."""

    skipped_steps = 0

    def __init__(self, method: Pedyra, run: Run) -> None:
        self.method, self.settings, self.run = method, method.settings, run
        self.layers = run.layers
        self.sketching = Sketching(run.layers, run.config, self.settings, run.schedule, run.average)
        self.reassign_at = method.reassignment_step(run, after=0)
        """The adjustment at which all ranks are assigned anew, if there is one."""
        self.trials: list[Trials] = []
        """What every adjustment so far measured of the triples on trial, oldest first."""
        self.last: LastAdjustment | None = None
        self.quiet = 0
        """Adjustments in a row without a move, from the reassignment on."""
        self._state_is_known = False

    @property
    def settled(self) -> bool:
        return bool(self.run.moves) and 0 < self.settings.patience <= self.quiet

    def observes(self, step: int) -> bool:
        return False

    def prepare(self, step: int) -> None:
        if not self.settled:
            self.sketching.prepare(step)

    def before_step(self, step: int, loss_scale: float, closure: Closure | None) -> None:
        self.sketching.observe(loss_scale)

    def skip_step(self) -> None:
        self.sketching.skip()

    def after_step(self, step: int) -> None:
        if not self._state_is_known:
            self._check_state(step)
        self._begin_trials(step)

    def _check_state(self, step: int) -> None:
        optimizer = self.run.optimizer
        parameters = [factor for layer in self.layers for factor in layer.factors]
        self._state_is_known = any(optimizer.state.get(parameter) for parameter in parameters)
        if not self._state_is_known:
            return
        if self.reassign_at is not None and not has_second_moments(optimizer, parameters):
            self.reassign_at = self.method.reassignment_step(self.run, after=step)
        if not self.method.trains_e(self.run.config):
            check_turnable(optimizer, parameters)

    def _begin_trials(self, step: int) -> None:
        """Switch off what is tried before the next adjustment, when its time has come and something would gain more.

        No more than the last adjustment had sure directions to replace: trying a triple is not free, the others do its
        work meanwhile, and it comes back among them.
        """
        sketch, last = self.sketching.current, self.last
        if sketch is None or not sketch.judges or last is None:
            return
        moves = min(moves_at(self.run.moves, last.moved), last.sure)
        if self.run.schedule.next_adjustment(step + 1) == self.reassign_at or not moves:
            return
        tried = {name for look in self.trials for name, gains in look.items() if gains}
        config, ranks = self.run.config, {layer.name: layer.rank for layer in self.layers}
        chosen, turns = choose(
            self.layers,
            curvature=self.curvature(),
            born={name: count for name, count in last.born.items() if ranks[name] == last.ranks[name]},
            unknown=set(last.promising) - tried,
            moves=moves,
            min_rank=config.min_rank,
            prices={layer.name: 1 if config.budget == "ranks" else layer.cost for layer in self.layers},
        )
        sketch.put_on_trial(chosen, turns)

    def curvature(self, *now: Trials) -> dict[str, Curvature]:
        """The curvature of every layer by all trials so far, and those of `now`."""
        return curvatures([layer.name for layer in self.layers], [*self.trials, *now])

    def triple_scores(self, turned: Sequence[Tensor] | None = None) -> Scores:
        """What pruning each triple costs to second order, or each of those that `turned` makes."""
        return predicted_losses(known_lengths(self.layers, turned), self.curvature())

    def decide(self, now: Situation) -> Decision | None:
        if not self.sketching.complete:
            if now.step == self.reassign_at:
                self.reassign_at = self.method.reassignment_step(self.run, after=now.step)
            return None
        self.sketching.stop()
        sketch = self.sketching.current
        if sketch is None:  # nothing is to move
            scores = self.triple_scores()
            return Decision(plan=make_plan(scores, {}, {}, layer_means(scores, {})), scores=scores, born=self._born)
        candidates, chance, trials = self.sketching.candidates(), self.sketching.chance(), sketch.trials()
        curvature = self.curvature(trials)
        payable = any(trials.values()) or now.spare >= min(now.costs.values())
        least = least_gain(predicted_losses(known_lengths(self.layers), curvature) if payable else {}, now.prices)
        contests = []
        reassigns = now.step == self.reassign_at
        if reassigns:
            scores, plan = reassign(self.layers, self.run.optimizer, now)
        else:
            scores = self.triple_scores(sketch.turned or None)
            plan, contests = plan_swaps(
                scores,
                candidates,
                trials,
                curvature,
                max_ranks=now.max_ranks,
                costs=now.prices,
                spare=now.unspent,
                certainty=self.settings.certainty,
                chance=chance,
                least=least,
                margin=margin_at(self.settings.margin, now.progress),
            )
            turns = self.sketching.turns()
            for layer in self.layers:
                if layer.name in plan.pruned and layer.name in turns:
                    turn_layer(layer, self.run.optimizer, turns[layer.name])
        moved = bool(plan.pruned or plan.added)
        promising = [name for name, gains in candidates.items() if gains and gains[0].beyond(chance)]
        self.last = LastAdjustment(
            moved=0 if reassigns else sum(plan.added.values()),
            sure=sum(gain.beyond(chance) for gains in candidates.values() for gain in gains),
            born=plan.added,
            ranks=plan.ranks,
            promising=promising,
        )
        waits = self.reassign_at is not None and now.step < self.reassign_at
        self.quiet = 0 if moved or waits else self.quiet + 1
        self.trials.append(trials)
        reasons = {
            "reassigned": reassigns and moved,
            "gains": {name: [g[0].mean, g[0].error, g[0].energy] for name, g in candidates.items() if g},
            "chance": chance if math.isfinite(chance) else None,
            "sure": self.last.sure,
            "trials": _rows(trials),
            "curvature": {name: each.by_energy for name, each in curvature.items()},
            "least_gain": least,
            "contests": [{**each._asdict(), "against": [list(of) for of in each.against]} for each in contests],
        }
        return Decision(plan=plan, scores=scores, born=self._born, reasons=reasons)

    def _born(self, layer: AdaptedLayer, pruned: tuple[int, ...], num: int, generator: torch.Generator) -> NewTriples:
        directions = self.sketching.directions(layer)
        return triples_along(directions, layer, pruned, num, start=self.run.config.start, generator=generator)

    def resized(self, replacements: Mapping[str, Sequence[Replacement]]) -> None:
        self.sketching.forget()

    def restart(self, step: int) -> None:
        self.sketching.forget()

    def describe(self) -> dict[str, Any]:
        in_vain = too_short_to_try(self.settings, self.run.config, self.run.schedule)
        return {"reassignment": self.reassign_at, "in_vain": in_vain}

    def snapshot(self, step: int) -> dict[str, Any]:
        nothing: dict[str, Any] = dict.fromkeys(("grad_norms", "layer_scores", "two_thirds_log_variance"))
        if step == 0:
            return nothing
        means = layer_means(self.triple_scores(), {})
        variance = two_thirds_log_variance(means, {layer.name: layer.rank for layer in self.layers})
        return nothing | {"layer_scores": means, "two_thirds_log_variance": variance}

    def tensors(self) -> dict[str, Tensor]:
        return self.sketching.tensors()

    def values(self) -> dict[str, Any]:
        last = None if self.last is None else vars(self.last)
        trials = [_rows(look) for look in self.trials]
        return {"last": last, "trials": trials, "quiet": self.quiet, "reassign_at": self.reassign_at}

    def load(self, step: int, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.last = None if values["last"] is None else LastAdjustment(**values["last"])
        self.trials = []
        for rows in values["trials"]:
            look: dict[str, dict[int, Gain]] = {}
            for name, triple, *measured in rows:
                look.setdefault(name, {})[triple] = Gain(*measured)
            self.trials.append(look)
        self.quiet, self.reassign_at = values["quiet"], values["reassign_at"]
        if self.reassign_at is not None and self.reassign_at > step:  # of a run that may have had other steps in all
            self.reassign_at = self.method.reassignment_step(self.run, after=step)
        self.sketching.load_tensors(tensors, step)

    def release(self) -> None:
        self.sketching.forget()


def _rows(trials: Trials) -> list[list[Any]]:
    """Plain values: layer, triple, and the fields of its `Gain`."""
    return [[name, triple, *gain] for name, gains in trials.items() for triple, gain in gains.items()]

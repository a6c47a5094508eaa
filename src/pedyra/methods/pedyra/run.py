"""Fit in the run: what of the adapter earns nothing is found from its own gradients, proved on batches, and cut.

A run goes through rounds of three parts. *Measuring*: over a window of steps before an adjustment, the sums of
`pedyra.fitting.gramians`; then the order in which directions may go and the cost of every prefix are known. *Asking*:
over the steps that follow, each batch's loss with and without one prefix, see `asking`. *Cutting*: at an adjustment a
set that may go is removed, exactly as it was asked about, and the rest trains on. Nothing is asked before the loss has
fallen, and a layer that still learns loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from pedyra.allocate.allocation import layer_means, make_plan
from pedyra.allocate.contract import Closure, Decision, MethodRun, Run, Situation
from pedyra.allocate.optimizer_checks import check_turnable
from pedyra.fitting.curve import Prefixes, num_parameters
from pedyra.fitting.gramians import Calibration, Gramians
from pedyra.fitting.verdict import Tolerance, run_verdict, won
from pedyra.lora.layer import holds_triples
from pedyra.methods.pedyra.asking import Account, Asking, still_learning
from pedyra.methods.pedyra.batches import Batches
from pedyra.methods.pedyra.turning import scaled, turn_layer

BEGINNING = 0.02
"""Part of the run whose loss is that before anything was learned; 4 steps at least."""
WINDOW = 0.1
"""Part of the run that a measuring window takes, or an interval: the more slopes, the smaller a cost can be proved."""
LOOK_BACK = 8
"""Steps at its end whose batches tell what was won."""
ASKING, ASKING_LEAST = 0.03, 48
"""Steps in which something is asked, as a part of the run, or at least: each costs two forward passes."""
KEPT = ("before", "now", "won", "cuts", "initial", "skipped_steps")
"""Attributes that a checkpoint has as they are."""


def most_batches(total_steps: int) -> int:
    """Steps of a run in which something may be asked."""
    return max(ASKING_LEAST, round(ASKING * total_steps))


class FitRun(MethodRun):
    """Fit in one run; `TargetRun` is what differs where the size is given."""

    fewest = 2
    """Adjustments that it takes to cut anything."""

    def __init__(self, run: Run) -> None:
        self.run, self.layers = run, {layer.name: layer for layer in run.layers}
        self.batches = Batches(run.model, run.average)
        total = run.schedule.total_steps
        self.account = Account(most_batches(total))
        self.beginning = max(4, round(BEGINNING * total))
        self.window = max(run.schedule.interval, round(WINDOW * total))
        self.skipped_steps, self.cuts = 0, 0
        self.prices = {name: layer.cost for name, layer in self.layers.items()}
        self.initial = {name: layer.rank for name, layer in self.layers.items()}
        """Layer -> rank at the start of the run."""
        self.before: list[list[float]] = []
        """Of each batch of the beginning its loss, and its samples."""
        self.now: list[list[float]] = []
        """Of each batch at the end of the window its loss, its loss without the adapter, and its samples."""
        self.won: list[float] | None = None
        """What fine-tuning had won by the last window, and its standard error."""
        self.gramians: Gramians | None = None
        """While measuring, and while asking."""
        self.asking: Asking | None = None

    @property
    def settled(self) -> bool:
        smallest = all(layer.rank <= self.run.config.min_rank for layer in self.run.layers)
        return self.run.moves == 0 or smallest or (self.asking is None and self.account.is_exhausted)

    @property
    def tolerance(self) -> Tolerance:
        """How much of what was won may be given up."""
        fall, error = self.won or (0.0, math.inf)
        return Tolerance(fall, error, self.run.config.tolerance)

    def observes(self, step: int) -> bool:
        return self.gramians is not None

    def prepare(self, step: int) -> None:
        adjustment = self.run.schedule.next_adjustment(step + 1)
        measures = adjustment is not None and adjustment - step <= self.window and not self.settled
        if self.asking is not None:
            measures = self.asking.question is not None
        if measures and self.gramians is None:
            self._measure()
        elif not measures and self.gramians is not None:
            self._stop()
        self.batches.wanted = measures or (step < self.beginning and self.run.moves > 0)

    def _measure(self) -> Gramians:
        average, blocks = self.run.average, 1 if self.asking else None  # an answer needs the last step alone
        total = None if average.processes == 1 else lambda part: average(part) * average.processes
        self.gramians = gramians = Gramians({name: layer.a.A for name, layer in self.layers.items()}, total, blocks)
        for name, layer in self.layers.items():
            layer.a.observer = gramians.observer(name)
        return gramians

    def _stop(self) -> None:
        for layer in filter(holds_triples, self.run.layers):  # not deleted since, nor detached
            layer.a.observer = None
        self.gramians = None

    def before_step(self, step: int, loss_scale: float, closure: Closure | None) -> None:
        if self.batches.wanted:
            if self.gramians is not None:
                self.gramians.close(self.batches.samples, self.batches.loss_scale(loss_scale, closure))
            self._look(step, closure)
            self.batches.forget()

    def _look(self, step: int, closure: Closure | None) -> None:
        """Run the step's batch again, where its losses are to be known."""
        self.batches.check(closure)
        adjustment = self.run.schedule.next_adjustment(step)
        if step <= self.beginning:
            self.before.append(self.batches.losses(closure))
        if self.gramians is None:
            return
        if self.asking is not None and self.asking.question is not None:
            prefixes = self.asking.prefixes
            projections = prefixes.calibration.projections(prefixes.ranks(self.asking.question.removals))
            on_layers = {self.layers[name]: projection for name, projection in projections.items()}
            whole, without, _ = self.batches.losses(closure, on_layers)
            K, samples = self.gramians.last()
            self.asking.tell(whole, without, samples, prefixes.slopes_of(K))
        elif adjustment is not None and adjustment - step < LOOK_BACK:
            nothing = {layer: torch.zeros(layer.rank, layer.rank) for layer in self.run.layers}
            self.now.append(self.batches.losses(closure, nothing))

    def skip_step(self) -> None:
        self.batches.forget()
        if self.gramians is not None:
            self.gramians.drop_step()

    def check_state(self) -> None:
        check_turnable(self.run.optimizer, [factor for layer in self.run.layers for factor in layer.factors])

    def decide(self, now: Situation) -> Decision | None:
        left = sum(step >= now.step for step in self.run.schedule.adjustments)
        if self.asking is not None:
            return self._go_on(self.asking, left)
        if self.gramians is None or self.gramians.blocks < 2:
            return None
        found = self.gramians.calibration(self.prices)
        self.skipped_steps += found.skipped
        self._stop()
        return self._begin(found, left)

    def _begin(self, found: Calibration, left: int) -> Decision:
        """After a window, with so many adjustments left, this one too."""
        self.won, self.now = won(self.before, self.now) or self.won, []
        if not self.tolerance.learned:
            return self._decision("nothing is learned yet", found)
        if left == 1:  # no other adjustment, at which a set could go
            return self._decision("no time is left", found)
        tolerance = max(0.0, self.tolerance.loss - self.account.spent)
        asking = self._round(found, tolerance)
        self.asking = asking if asking.question else None
        state, learning = "asking" if asking.question else "nothing may go", still_learning(found, tolerance)
        return self._decision(state, found, learning=learning)

    def _round(self, found: Calibration, tolerance: float) -> Asking:
        prefixes = Prefixes(found, self.run.config.min_rank, {*still_learning(found, tolerance)})
        return Asking(prefixes, tolerance, self.account, num_parameters(found, self.initial))

    def _go_on(self, asking: Asking, left: int) -> Decision:
        """Ask on, or end the round."""
        found = asking.prefixes.calibration
        if asking.question is not None and left > 1:
            return self._decision("asking", found)
        self._stop()
        self.asking = None
        if asking.may_go == 0:
            return self._decision("nothing may go", found)
        self.account.spent += asking.cost_of_it
        return self._decision("cut", found, self._cut(found, asking.prefixes.ranks(asking.may_go)))

    def _cut(self, found: Calibration, ranks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Turn each layer that loses any to its balanced directions: layer -> those that go, the last ones."""
        self.cuts += 1
        pruned = {}
        for name, measured in found.layers.items():
            if ranks[name] < measured.rank:
                turn_layer(self.layers[name], self.run.optimizer, scaled(measured.basis, self.layers[name]))
                pruned[name] = tuple(range(ranks[name], measured.rank))
        return pruned

    def _decision(
        self, state: str, found: Calibration, pruned: dict[str, tuple[int, ...]] | None = None, **more: Any
    ) -> Decision:
        costs = {name: layer.costs.tolist() for name, layer in found.layers.items()}
        plan = make_plan(costs, pruned or {}, {}, layer_means(costs, pruned or {}))
        share = num_parameters(found, plan.ranks) / num_parameters(found, self.initial)
        reasons = {"state": state, "share": share, **self._reasons(share), **more}
        return Decision(plan=plan, scores=costs, reasons={"fit": reasons})

    def _reasons(self, share: float) -> dict[str, Any]:
        limit, account = self.tolerance, asdict(self.account)
        del account["most_batches"]
        verdict, words = run_verdict(self.account.points, share, max(self.initial.values()), limit.learned)
        tolerance = limit.loss if self.won else None
        return {"verdict": verdict, "words": words, "won": self.won, "tolerance": tolerance, **account}

    def restart(self, step: int) -> None:
        self._stop()
        self.asking, self.now = None, []

    def describe(self) -> dict[str, Any]:
        too_few = self.run.moves > 0 and len(self.run.schedule.adjustments) < self.fewest
        told = "nothing will be cut: sets are asked about between two adjustments, and there is one; train longer"
        return {"in_vain": told if too_few else None}

    def tensors(self) -> dict[str, Tensor]:
        return {name: each for of in (self.gramians, self.asking) if of for name, each in of.tensors().items()}

    def values(self) -> dict[str, Any]:
        asking, account = self.asking and self.asking.values(), asdict(self.account)
        return {**{name: getattr(self, name) for name in KEPT}, "account": account, "asking": asking}

    def load(self, step: int, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        for name in KEPT:
            setattr(self, name, values[name])
        self.account = Account(**values["account"])
        if (asked := values["asking"]) is not None:
            self.asking = self._round(Calibration.of(tensors, self.prices), asked["tolerance"])
            self.asking.load(asked, tensors)
        if any(name.startswith("P.") for name in tensors):
            self._measure().load(tensors)

    def release(self) -> None:
        self._stop()
        self.batches.remove()

"""Fit in the run: what of the adapter earns nothing is found from its own gradients, proved on batches, and cut.

A run goes through rounds of three parts. *Measuring*: over a window of steps before an adjustment, the sums of
`pedyra.fit.gramians`; then the order in which directions may go and the cost of every prefix are known. *Asking*: over
the steps that follow, each batch's loss with and without one prefix, see `asking`. *Cutting*: at an adjustment a set
that may go is removed, exactly as it was asked about, and the rest trains on. Nothing is asked before the loss has
fallen, and a layer that still learns loses nothing.

With `target_rank` the size is given: nothing is asked, and three cuts lead there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from pedyra.allocate.allocation import layer_means, make_plan
from pedyra.allocate.contract import Closure, Decision, Run, Situation
from pedyra.allocate.optimizer_checks import check_turnable
from pedyra.fit.gramians import Calibration, Gramians
from pedyra.fit.verdict import Tolerance
from pedyra.fit.worth import Balance
from pedyra.lora.layer import AdaptedLayer, holds_triples
from pedyra.lora.resize import NewTriples, Replacement
from pedyra.methods.pedyra.asking import Account, Asking
from pedyra.methods.pedyra.batches import Batches, nothing, won
from pedyra.methods.pedyra.sizes import Sizes, kept
from pedyra.methods.pedyra.turning import turn_layer
from pedyra.methods.pedyra.words import in_words, verdict

BEGINNING = 0.02
"""Part of the run whose loss is that before anything was learned; 4 steps at least."""
WINDOW, SHORT = 0.1, 40
"""Part of the run that a measuring window takes, or an interval: the more slopes, the smaller a cost can be proved. On
the way to a `target_rank`, where nothing is asked: so many steps at most."""
LOOK_BACK = 8
"""Steps at its end whose batches tell what was won."""
ASKING, ASKING_LEAST = 0.03, 48
"""Steps in which something is asked, as a part of the run, or at least: each costs two forward passes."""
CUTS = 3
"""On the way to a `target_rank`."""
KEPT = ("before", "now", "won", "cuts", "initial", "skipped_steps")


class FitRun:
    """Fit in one run: a `MethodRun`."""

    def __init__(self, run: Run) -> None:
        self.run, self.layers = run, {layer.name: layer for layer in run.layers}
        self.batches = Batches(run.model, run.average)
        self.skipped_steps, self.cuts = 0, 0
        total = run.schedule.total_steps
        self.account = Account(most_batches(total))
        self.beginning = max(4, round(BEGINNING * total))
        interval = run.schedule.interval
        asks = self.run.config.target_rank is None
        self.window = max(interval, round(WINDOW * total)) if asks else min(SHORT, interval)
        self.initial = {name: layer.rank for name, layer in self.layers.items()}
        """Layer -> rank at the start of the run."""
        self.before: list[list[float]] = []
        """Loss and samples of batches of the beginning."""
        self.now: list[list[float]] = []
        """Loss, loss without the adapter, and samples of the batches at the end of the window."""
        self.won: list[float] | None = None
        """What fine-tuning had won by the last window, and its standard error."""
        self.gramians: Gramians | None = None
        """While measuring, and while asking."""
        self.calibration: Calibration | None = None
        """While asking: what the sets come from."""
        self.asking: Asking | None = None

    @property
    def settled(self) -> bool:
        if self.run.moves == 0 or all(layer.rank <= self.run.config.min_rank for layer in self.run.layers):
            return True
        if self.target is not None:
            return self.cuts >= CUTS
        return self.asking is None and self.account.is_exhausted

    @property
    def target(self) -> int | None:
        """Parameters to end with, where they are given."""
        rank = self.run.config.target_rank
        return None if rank is None else self._parameters(dict.fromkeys(self.layers, rank))

    def _parameters(self, ranks: Mapping[str, int]) -> int:
        return sum(layer.cost * ranks[name] for name, layer in self.layers.items())

    def observes(self, step: int) -> bool:
        return self.gramians is not None

    def prepare(self, step: int) -> None:
        adjustment = self.run.schedule.next_adjustment(step + 1)
        asks = self.asking is not None and self.asking.question is not None
        near = adjustment is not None and adjustment - step <= self.window
        measures = asks or self.asking is None and near and not self.settled
        if self.gramians is None and measures:
            self._measure()
        elif self.gramians is not None and not measures:
            self._stop()
        begins = step < self.beginning and self.target is None and self.run.moves > 0
        self.batches.wanted = asks or begins or self.gramians is not None

    def _measure(self) -> None:
        ranks = {name: layer.rank for name, layer in self.layers.items()}
        devices = {name: layer.a.A.device for name, layer in self.layers.items()}
        average = self.run.average
        blocks = 1 if self.asking else None  # an answer needs the last step alone
        self.gramians = Gramians(ranks, devices, average if average.processes > 1 else None, average.processes, blocks)
        for name, layer in self.layers.items():
            layer.a.observer = self.gramians.observer(name)

    def before_step(self, step: int, loss_scale: float, closure: Closure | None) -> None:
        if not self.batches.wanted:
            return
        adjustment = self.run.schedule.next_adjustment(step)
        if self.gramians is not None:
            self.gramians.close(self.batches.samples, self.batches.loss_scale(loss_scale, closure))
        if self.target is None:
            self.batches.check(closure)
            if step <= self.beginning:
                (loss,), samples = self.batches.losses(closure)
                self.before.append([loss, samples])
            ends = adjustment is not None and adjustment - step < LOOK_BACK
            if self.gramians is not None and self.asking is None and ends:
                (loss, none), samples = self.batches.losses(closure, nothing(self.run.layers))
                self.now.append([loss, none, samples])
            if self.asking is not None and self.asking.question is not None:
                assert self.calibration is not None and self.gramians is not None
                ranks = self.asking.sizes.after(self.asking.question.removals).ranks
                projections = {self.layers[n]: P for n, P in kept(ranks, self.calibration).items()}
                (whole, without), _ = self.batches.losses(closure, projections)
                K, samples = self.gramians.last()
                self.asking.tell(whole, without, samples, self.asking.sizes.slopes_of(K))
        self.batches.forget()

    def skip_step(self) -> None:
        self.batches.forget()
        if self.gramians is not None:
            self.gramians.drop_step()

    def check_state(self) -> None:
        check_turnable(self.run.optimizer, [factor for layer in self.run.layers for factor in layer.factors])

    @property
    def tolerance(self) -> Tolerance:
        """How much of what was won may be given up."""
        won, error = self.won or (0.0, math.inf)
        return Tolerance(won, error, self.run.config.tolerance)

    def decide(self, now: Situation) -> Decision | None:
        left = sum(step >= now.step for step in self.run.schedule.adjustments)
        if self.asking is not None:
            assert self.calibration is not None
            asks_on = self.asking.question is not None and left > 1
            return self._nothing("asking", self.calibration) if asks_on else self._end_round()
        if self.gramians is None or self.gramians.blocks < 2:
            return None
        found = self.gramians.calibration({name: layer.cost for name, layer in self.layers.items()})
        self.skipped_steps += found.skipped
        self._stop()
        if self.target is not None:
            return self._cut_towards(self.target, found, left)
        self.won, self.now = won(self.before, self.now) or self.won, []
        if not self.tolerance.learned:
            return self._nothing("nothing is learned yet", found)
        if left == 1:  # no other adjustment, at which a set could go
            return self._nothing("no time is left", found)
        tolerance = max(0.0, self.tolerance.loss - self.account.spent)
        sizes = Sizes(found, self.run.config.min_rank, tolerance=tolerance)
        asking = Asking(sizes, tolerance, self.account, self._parameters(self.initial))
        if asking.question is None:
            return self._nothing("nothing may go", found, learning=sizes.learning)
        self.calibration, self.asking = found, asking
        return self._nothing("asking", found, learning=sizes.learning)

    def _end_round(self) -> Decision:
        asking, calibration = self.asking, self.calibration
        assert asking is not None and calibration is not None
        self._stop()
        self.asking = self.calibration = None
        if asking.may_go == 0:
            return self._nothing("nothing may go", calibration)
        self.account.spent += asking.cost_of_it
        return self._cut(calibration, asking.sizes.after(asking.may_go).ranks)

    def _cut_towards(self, target: int, found: Calibration, left: int) -> Decision:
        """The next of `CUTS` cuts, or of as many as there are adjustments left; each leaves the same part."""
        sizes = Sizes(found, self.run.config.min_rank, all_may_go=True)
        parameters = sizes.after(0).parameters
        wanted = parameters * (target / parameters) ** (1 / min(CUTS - self.cuts, left))
        return self._cut(found, sizes.after(sizes.of_parameters(max(target, round(wanted)))).ranks)

    def _nothing(self, state: str, calibration: Calibration, **more: Any) -> Decision:
        scores = {name: layer.costs.tolist() for name, layer in calibration.layers.items()}
        plan = make_plan(scores, {}, {}, layer_means(scores, {}))
        reasons = {"fit": self._reasons(state, plan.ranks, **more)}
        return Decision(plan=plan, scores=scores, born=_none_is_born, reasons=reasons)

    def _cut(self, calibration: Calibration, ranks: Mapping[str, int]) -> Decision:
        self.cuts += 1
        measured = calibration.layers
        scores = {name: layer.costs.tolist() for name, layer in measured.items()}
        pruned = {n: tuple(range(rank, measured[n].rank)) for n, rank in ranks.items() if rank < measured[n].rank}
        for name in pruned:
            turn_layer(self.layers[name], self.run.optimizer, scaled(measured[name].basis, self.layers[name]))
        plan = make_plan(scores, pruned, {}, layer_means(scores, pruned))
        return Decision(plan=plan, scores=scores, born=_none_is_born, reasons={"fit": self._reasons("cut", plan.ranks)})

    def _reasons(self, state: str, ranks: Mapping[str, int], **more: Any) -> dict[str, Any]:
        points, limit = self.account.points, self.tolerance
        share = self._parameters(ranks) / self._parameters(self.initial)
        found: dict[str, Any] = {"state": state, "share": share}
        if self.target is None:
            words = in_words(points, share, max(self.initial.values()), limit.learned)
            account = {name: value for name, value in asdict(self.account).items() if name != "most_batches"}
            found |= {"verdict": verdict(points, share), "words": words, "won": self.won, **account}
            found |= {"tolerance": limit.loss if self.won else None}
        return found | more

    def _stop(self) -> None:
        for layer in filter(holds_triples, self.run.layers):  # not deleted since, nor detached
            layer.a.observer = None
        self.gramians = None

    def resized(self, replacements: Mapping[str, Sequence[Replacement]]) -> None:
        """The next window begins anew."""

    def restart(self, step: int) -> None:
        self._stop()
        self.calibration, self.asking, self.now = None, None, []

    def describe(self) -> dict[str, Any]:
        too_few = self.run.moves and self.target is None and len(self.run.schedule.adjustments) < 2
        told = "nothing will be cut: sets are asked about between two adjustments, and there is one; train longer"
        return {"in_vain": told if too_few else None}

    def snapshot(self, step: int) -> dict[str, Any]:
        return dict.fromkeys(("grad_norms", "layer_scores", "two_thirds_log_variance"))

    def tensors(self) -> dict[str, Tensor]:
        holders = (self.gramians, self.calibration, self.asking)
        return {name: each for holder in holders if holder is not None for name, each in holder.tensors().items()}

    def values(self) -> dict[str, Any]:
        asking = None if self.asking is None else self.asking.values()
        return {**{name: getattr(self, name) for name in KEPT}, "account": asdict(self.account), "asking": asking}

    def load(self, step: int, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        for name in KEPT:
            setattr(self, name, values[name])
        self.account = Account(**values["account"])
        self._stop()
        self.calibration = self.asking = None
        if values["asking"] is not None:
            self.calibration = Calibration.of(tensors, {name: layer.cost for name, layer in self.layers.items()})
            tolerance = values["asking"]["tolerance"]
            sizes = Sizes(self.calibration, self.run.config.min_rank, tolerance=tolerance)
            self.asking = Asking(sizes, tolerance, self.account, self._parameters(self.initial))
            self.asking.load(values["asking"], tensors)
        if any(name.startswith("P.") for name in tensors):
            self._measure()
            assert self.gramians is not None
            self.gramians.load(tensors)

    def release(self) -> None:
        self._stop()
        self.batches.remove()


def most_batches(total_steps: int) -> int:
    """Steps of a run in which something may be asked."""
    return max(ASKING_LEAST, round(ASKING * total_steps))


def scaled(basis: Balance, layer: AdaptedLayer) -> Tensor:
    """W `(r, r)` that turns a layer to its balanced directions, each row of A as long as rows are now on average.

    Adam's steps are as large for every element whatever its size, so lengths decide how fast a direction turns.
    """
    A = layer.a.A.detach().double().cpu()
    lengths = (basis.T @ A).norm(dim=1)
    mean = A.norm(dim=1).mean()
    factors = torch.where(lengths > 1e-12 * mean, mean / lengths, torch.ones_like(lengths))
    return (factors[:, None] * basis.T).to(layer.a.A.device)


def _none_is_born(layer: AdaptedLayer, pruned: tuple[int, ...], num: int, generator: torch.Generator) -> NewTriples:
    raise AssertionError("fit adds no triple")

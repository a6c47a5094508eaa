"""Of several cuts of one size the one is chosen whose answers are nearest to those of the whole adapter.

Slopes come from few rows, and a repair that fits them may do harm on others: of an adapter of four classes three
calibrations made cuts to rank 2 that cost +0.78, +0.11 and +0.03, where singular values cost +0.06. And one rank for
all layers may leave out a direction that one layer cannot do without: there the pooler needs three. So the cuts of a
size are compared on rows that calibrated nothing, which costs forward passes alone, and only the chosen one is compared
with the tolerance on held-out rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object

from pedyra.fitting.balance import balance, in_basis
from pedyra.fitting.calibration import Calibration, lora_layers
from pedyra.fitting.cut import cut_factors, cut_to
from pedyra.fitting.judge import Batch, Cut, Judge
from pedyra.fitting.logits import divergences
from pedyra.fitting.modes import evaluating
from pedyra.fitting.sizes import Candidate, Ranks, of_rank, predicted_increase, size, whole

CHOOSING = 16
"""At most this number of batches choose among cuts, and at most a quarter of those that would calibrate. They calibrate
nothing, since a repair is always good on the rows that it was made from."""
NEGLIGIBLE = 0.005
"""A cut whose answers are no further than this from the whole adapter's, in nats an answer, is taken without a look at
others: none of them can be better by more."""
STANDS_OUT = 10
"""A direction beyond the rank stays if it is worth a tenth of all that the cut removes, and ten times their mean."""
WORTH_MORE = 0.5
"""Mixed ranks have more parameters, so they are taken where they leave at most this part of the divergence."""


def choosing(batches: int, processes: int) -> int:
    """Return how many of the calibration batches of a process choose, of so many in all of them; none of fewer than
    eight, all of which have to calibrate."""
    return max(1, min(CHOOSING, batches // 4) // processes) if batches >= 8 else 0


def by_singular_values(model: Any, calibration: Calibration, adapter: str = "default") -> Calibration:
    """Return the same sums along the directions of the singular values of B A, the largest first."""
    layers = {}
    for name, module in lora_layers(model, adapter).items():
        A, B = (slot[adapter].weight.detach().double().cpu() for slot in (module.lora_A, module.lora_B))
        basis = balance(A @ A.T, B.T @ B)  # of white inputs and gradients
        layer = calibration.layers[name]
        K = layer.basis.inverse @ layer.products @ layer.basis.T
        layers[name] = replace(layer, basis=basis, products=in_basis(K, basis))
    return replace(calibration, layers=layers)


def standing_out(calibration: Calibration, ranks: Ranks) -> Ranks:
    """Return these ranks with the directions beyond them that are clearly worth more than the others."""
    worth = {
        name: [
            max(0.0, predicted_increase(layer.slopes[:, place], calibration.samples))
            for place in range(ranks[name], layer.rank)
        ]
        for name, layer in calibration.layers.items()
    }
    removed = [each for values in worth.values() for each in values]
    least = sum(removed) * max(1 / STANDS_OUT, STANDS_OUT / max(1, len(removed)))

    def beyond(values: list[float]) -> int:
        return max((place for place, each in enumerate(values, 1) if each >= least > 0), default=0)

    return {name: rank + beyond(worth[name]) for name, rank in ranks.items()}


PASSES = 7
"""A size takes this number of forward passes at most of each batch that chooses: of three cuts and a mixed one, and of
the whole adapter beside each of the three comparisons."""


class Choice:
    """The cuts of a calibration: its own directions with repair, and those of singular values with repair and without.

    Args:
        batches: rows that have calibrated nothing; without any, the calibration's own cut is taken.
        mixed: layers may keep more than the rank.
        without: these layers keep nothing.
    """

    def __init__(
        self,
        judge: Judge,
        calibration: Calibration,
        batches: Sequence[Batch],
        adapter: str,
        *,
        mixed: bool,
        without: Sequence[str] = (),
    ) -> None:
        self._judge, self._batches, self._adapter, self._mixed, self._without = judge, batches, adapter, mixed, without
        singular = by_singular_values(judge.model, calibration, adapter)
        self.ways = {
            "calibrated": calibration,
            "singular values": replace(singular, repairs=False),
            "singular values, repaired": singular,
        }
        self._chosen: dict[int, Candidate] = {}

    @property
    def whole(self) -> Candidate:
        """Return the adapter as it is."""
        calibration = self.ways["calibrated"]
        return size(calibration, whole(calibration))

    def of_rank(self, rank: int) -> Candidate:
        """Choose the cut in which every layer has this rank, or all of its own, or as one of `without` none."""
        if rank not in self._chosen:
            self._chosen[rank] = self._choose(rank)
        return self._chosen[rank]

    def factors(self, each: Candidate) -> Any:
        """Make the factors of this cut."""
        return cut_factors(self._judge.model, self.ways[each.way or "calibrated"], each.ranks, self._adapter)

    def _choose(self, rank: int) -> Candidate:
        uniform = [replace(of_rank(each, rank, self._without), way=way) for way, each in self.ways.items()]
        if not self._batches or uniform[0].ranks == self.whole.ranks:
            return uniform[0]
        distances = self._distances(uniform[:1])
        if distances[0] <= NEGLIGIBLE:
            return uniform[0]
        distances += self._distances(uniform[1:])
        best = min(range(len(uniform)), key=distances.__getitem__)
        if self._mixed and distances[best] > NEGLIGIBLE:
            calibration = self.ways[uniform[best].way]
            mixed = replace(size(calibration, standing_out(calibration, uniform[best].ranks)), way=uniform[best].way)
            if mixed.ranks != uniform[best].ranks and self._distances([mixed])[0] <= WORTH_MORE * distances[best]:
                return mixed
        return uniform[best]

    def _distances(self, candidates: Sequence[Candidate]) -> list[float]:
        """Return how far the answers of each cut are from those of the whole adapter: the mean divergence, or, where
        the model gives no answers, the rise of the loss."""
        model = self._judge.model
        as_it_is: Cut = partial(evaluating, model)
        cuts = [as_it_is, *(partial(cut_to, model, self.factors(each), self._adapter) for each in candidates)]
        own: list[tuple[list[float], float]] = []
        for batch in self._batches:
            first, *others = (self._judge.answering(cut)(batch) for cut in cuts)
            if first is not None:
                values_of = [divergences(each.values, first.values) for each in others if each is not None]
                values, weight = [float(each.mean()) for each in values_of], float(len(first.values))
            else:
                values, weight = self._rises(batch, cuts), self._judge.samples(batch)
            if weight > 0 and all(map(math.isfinite, values)):
                own.append((values, weight))
        every = gather_object(own)
        total = sum(weight for _, weight in every)
        return [sum(w * values[place] for values, w in every) / max(total, 1e-9) for place in range(len(candidates))]

    def _rises(self, batch: Batch, cuts: Sequence[Cut]) -> list[float]:
        losses = []
        for cut in cuts:
            torch.manual_seed(0)
            with cut(), torch.no_grad():
                losses.append(float(self._judge.trained_loss(batch)) / self._judge.loss_scale)
        return [loss - losses[0] for loss in losses[1:]]

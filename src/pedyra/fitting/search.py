"""Which size: found on the rows of the choice, proved on rows of its own.

**Choice.** Sizes are measured from the largest down, each half of the one before, until one is rejected; then between
it and the last that was accepted, by halving the ratio. These measurements prove nothing and need no correction for how
many there are: they only say where to begin.

**Proof.** Other rows, and an order of sizes that is fixed before any size is measured on them: from four times the size
that was found, or a larger one that the rows of the choice call safe, down past the one that was found, to the first
whose upper bound (95 %) is beyond tolerance. The last one before it is taken. Asked in an order that the rows have no
part in, each size may be held to the whole 5 % of doubt, and still the probability that one is taken which is beyond
tolerance is 5 % at most (fixed-sequence test; Westfall and Krishen 2001, "Optimally weighted, fixed sequence and
gatekeeper multiple testing procedures"): the first such size in the order is accepted in 5 % of cases, and where it is
not, nothing after it is asked.

**Recovery** is tried where more than `ENOUGH` of the parameters is left by that order, for sizes below the one it took:
each half of the one before, as long as the rows of the choice promise that the proof accepts it. So there are two
orders, and they share the doubt (Bonferroni): `DOUBTS`. Where the second one begins is known from the proof of the
first. That makes it wrong no more often, by the simulation of tests/fitting/test_search.py. Steps that do not help,
which add noise of their own, cannot stop a cut that is good enough by itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from pedyra.fitting.curve import Ladder
from pedyra.fitting.verdict import CONFIDENCE, Candidate, Factors, Increase, Metrics, Tolerance

logger = logging.getLogger(__name__)

COARSE = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 0.0)
"""Parts that are tried first, of the parameters or, in a fit for general text, of the harm; 0: the least there is."""
SHARES = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 3 / 32, 1 / 16, 3 / 64, 1 / 32, 1 / 64, 0.0)
"""Those of the whole curve: about a factor of 1.4 apart."""
PROOFS = 6
"""Sizes of the proof at most, as they are cut."""
ENOUGH = 1 / 4
"""Part of the parameters that is small enough: recovery is for what is left above it, since it costs more time than the
cut itself."""
DOUBTS = (0.03, 0.02)
"""Of the sizes as they are cut and of those after recovery, where both may be asked; together 1 - CONFIDENCE. Of eleven
fits at the whole doubt two would have kept more at 0.03, and four at 0.025."""
ABOVE, BELOW = 4.0, 2**-0.5
"""The first size of the proof is at least so many times the one that was found, and the last one is this part of it.
The first is far above, because where it is rejected nothing is proved, and few rows for the choice are often too
hopeful. In the simulation of tests/fitting/test_search.py, at its noise and at six times that, 0.306 and 0.434 of the
parameters stay on average; 0.292 and 0.434 where it is twice, with which a fit of ten batches kept everything."""
LARGEST = 3 / 4
"""Part of the parameters at which a proof begins at most, unless more were found to be needed."""
NEAR = 1.2
"""Ratio of two sizes between which nothing is tried."""
TRIES = 6
"""Sizes that are measured on the rows of the choice at most, but for a whole curve. With the base, the whole adapter
and the proof, whose rows are twice as many, that is at most eight evaluations of all held-out rows."""
RECOVERIES = 4
"""Sizes that are tried after recovery at most; with their proof that is at most four evaluations more."""


class Asked(Protocol):
    """What a search asks of a size; `pedyra.fitting.sizes` measures it."""

    @property
    def recovers(self) -> bool:
        """Whether there are steps of recovery."""
        ...

    @property
    def ahead(self) -> tuple[float, int]:
        """Of the rows of the proof, their standard error as a part of that of the choice, and their batches."""
        ...

    def on_choice(self, size: Candidate) -> Increase:
        """On the rows of the choice, as it is cut."""
        ...

    def after_recovery(self, size: Candidate) -> tuple[Increase, Factors]:
        """The same after steps of recovery, and the factors then."""
        ...

    def on_proof(self, size: Candidate) -> tuple[Increase, Metrics]:
        """On the rows of the proof, as it would be taken."""
        ...


class Search:
    """The sizes of one adapter, and what was measured of them.

    Args:
        ladder: every size.
        limit: by how much the loss may rise, and how well that is known.
        sizes: what is asked of each.
    """

    def __init__(self, ladder: Ladder, limit: Tolerance, sizes: Asked) -> None:
        self.ladder, self.limit, self._sizes = ladder, limit, sizes
        self._recovers = sizes.recovers
        self._doubt, self._doubt_after_recovery = DOUBTS if self._recovers else (1 - CONFIDENCE, 0.0)
        self.points: dict[int, Candidate] = {}
        """Place -> what was measured of this size."""

    @property
    def curve(self) -> list[Candidate]:
        """The sizes that were looked at, the largest first."""
        return [self.points[index] for index in sorted(self.points)]

    def point(self, index: int) -> Candidate:
        if index not in self.points:
            self.points[index] = self.ladder.point(index)
        return self.points[index]

    def measured(self, index: int) -> Candidate:
        """This size, measured on the rows of the choice."""
        if self.point(index).choice is None:
            self.points[index] = replace(self.point(index), choice=self._sizes.on_choice(self.point(index)))
        return self.points[index]

    def recovered(self, index: int) -> Candidate:
        """This size, measured on the rows of the choice after recovery too, where there is room for its steps."""
        known = self.points.get(index)
        if known is not None and known.recovered is not None:
            return known
        if self._recovers:
            try:
                found, factors = self._sizes.after_recovery(self.point(index))
            except torch.OutOfMemoryError as error:
                if torch.distributed.is_available() and torch.distributed.is_initialized():
                    raise  # other processes may wait for this one
                logger.warning(
                    "fit: there is no room for recovery, so sizes are judged as they are cut: %s", str(error)
                )
                self._recovers = False
            else:
                self.points[index] = replace(self.point(index), recovered=found, factors=factors)
                return self.points[index]
        return self.ladder.point(index) if known is None else known

    def proved(self, index: int, doubt: float = 1 - CONFIDENCE) -> Candidate:
        """This size, measured on the rows of the proof as it would be taken."""
        size = self.point(index)
        found, metrics = self._sizes.on_proof(size)
        self.points[index] = replace(
            size,
            proof=found,
            proof_after_recovery=size.gains_by_recovery,
            metrics=metrics,
            accepted=self.limit.allows(found, doubt=doubt),
        )
        return self.points[index]

    def promises(self, point: Candidate, doubt: float) -> bool:
        """Whether the proof would accept it, were its mean on those rows the same."""
        return point.best is not None and self.limit.allows(point.best, *self._sizes.ahead, doubt=doubt)

    def choose(self, wholly: bool = False) -> Candidate | None:
        """The smallest size that the proof accepts in its order; None: there is none.

        Args:
            wholly: measure the whole curve on the rows of the choice.
        """
        found = self._found(SHARES if wholly else COARSE, wholly)
        chosen = self._last_accepted(self._order(found), self._doubt)
        if self._recovers and (chosen is None or self.ladder.share(chosen) > ENOUGH):
            promising = self._promising_after_recovery(chosen)
            recovered = self._last_accepted(promising, self._doubt_after_recovery)
            chosen = chosen if recovered is None else recovered
        return None if chosen is None else self.points[chosen]

    def measure_curve(self) -> None:
        """Measure the whole curve on the rows of the choice."""
        self._found(SHARES, True)

    def _order(self, found: int) -> list[int]:
        """Places of the proof, in equal ratios from a size that is safe down to a little below the one at `found`."""
        share, most = self.ladder.share(found), min(LARGEST, self.ladder.share(0))
        first, last = max(share, min(most, max(ABOVE * share, self._safe()))), BELOW * share
        shares = [first * (last / first) ** (step / (PROOFS - 1)) for step in range(PROOFS - 1)]
        places = [self.ladder.at(each) for each in (*shares, last)]
        # Where none may be kept whole, the largest is asked first: without it a fit would be refused for nothing.
        return places if self.ladder.is_whole(0) else [0, *places[1:]]

    def _safe(self) -> float:
        """Part of the parameters of the smallest size that is within tolerance on the rows of the choice, and all that
        were measured above it, even if a cut gains nothing.

        What was found may be far too hopeful: where few rows seem to gain by a cut, that is mostly their noise.
        """
        safe = LARGEST
        for index in sorted(self.points):
            measured = self.points[index].choice
            if measured is None:
                continue
            if not self.limit.allows(measured._replace(mean=max(0.0, measured.mean)), doubt=self._doubt):
                break
            safe = min(safe, self.ladder.share(index))
        return safe

    def _last_accepted(self, order: Sequence[int], doubt: float) -> int | None:
        """The last of these places, from the largest size down, that the proof accepts before it rejects one."""
        chosen = None
        for index in self._smaller(order):
            if not self.proved(index, doubt).accepted:
                break
            chosen = index
        return chosen

    def _smaller(self, order: Sequence[int]) -> list[int]:
        """Those places that lose something, each once, the largest size first."""
        return sorted({index for index in order if not self.ladder.is_whole(index)})

    def _found(self, shares: Sequence[float], wholly: bool) -> int:
        """The place of the smallest size that promises to be within tolerance before the first that does not; the
        first place, where none does."""
        accepted, rejected = 0, None
        if not self.ladder.is_whole(0) and not self.promises(self.measured(0), self._doubt):
            if not wholly:
                return 0
            rejected = 0
        for share in shares:
            index = self.ladder.at(share)
            if index == accepted or (not wholly and len(self.points) >= TRIES):
                continue
            promises = self.promises(self.measured(index), self._doubt)
            if promises and rejected is None:
                accepted = index
            elif not promises:
                rejected = index if rejected is None else rejected
                if not wholly:
                    break
        while rejected is not None and (wholly or len(self.points) < TRIES):
            between = self._between(accepted, rejected)
            if between is None:
                break
            if self.promises(self.measured(between), self._doubt):
                accepted = between
            else:
                rejected = between
        return accepted

    def _between(self, larger: int, smaller: int) -> int | None:
        """The place halfway: where their ratio is halved, or, where no other place is, in the middle of the places
        between. None where the two are near to each other."""
        high, low = self.ladder.share(larger), self.ladder.share(smaller)
        middle = self.ladder.at(math.sqrt(high * low))
        if middle in (larger, smaller):
            middle = (larger + smaller) // 2
        return None if high / low <= NEAR or middle in (larger, smaller) else middle

    def _promising_after_recovery(self, above: int | None) -> list[int]:
        """Sizes below that at `above` (None: of all that lose something) which promise to be within tolerance after
        recovery: each half of the one before is tried until one does not, then between."""
        accepted = 0 if above is None and self.ladder.is_whole(0) else above
        rejected, promising = None, []
        for _ in range(RECOVERIES):
            if accepted is None:
                index = 0
            elif rejected is None:
                index = self.ladder.at(self.ladder.share(accepted) / 2)
            else:
                index = self._between(accepted, rejected)
            if index is None or index == accepted:
                break
            if self.promises(self.recovered(index), self._doubt_after_recovery):
                accepted = index
                promising.append(index)
            elif accepted is None:
                break
            else:
                rejected = index
        return promising

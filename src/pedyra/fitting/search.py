"""Sizes are tested one after the other, from the largest down, to the first that is not within tolerance.

The order is fixed before any row is seen, and all are tested on the same held-out rows. So each size is tested with the
whole 5 % of doubt, and still the probability of choosing one that is beyond tolerance is 5 % at most (fixed-sequence
test; Westfall and Krishen 2001, "Optimally weighted, fixed sequence and gatekeeper multiple testing procedures"): the
first such size in the order is accepted in 5 % of cases, and where it is not, nothing after it is tested.

A size that is clearly within tolerance, or clearly beyond it, does not need all rows: `LOOKS`. The chosen one is tested
once more on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from pedyra.fitting.heldout import Comparison
from pedyra.fitting.sizes import Candidate
from pedyra.fitting.verdict import DOUBT, Tolerance

LOOKS = ((1 / 4, 0.004), (1 / 2, 0.012), (1.0, 0.04))
"""Parts of the rows, each with the doubt with which a size is accepted on it. A size just beyond tolerance is accepted
at one of the three looks in 4 to 5 % of cases (tests/fitting/test_search.py)."""
REJECTED = 0.01
"""The doubt with which a size is rejected on a part of the rows."""
LEAST, FEW = 12, 24
"""Batches of held-out rows: fewer than `LEAST` give no interval worth the name, and fewer than `FEW` a wide one; a look
has at least `FEW`."""

Ask = Callable[[Candidate, float], Comparison]
"""Measures a size on this part of the held-out rows."""


def search(sizes: Iterable[Candidate], limit: Tolerance, ask: Ask, batches: int) -> list[Candidate]:
    """Return the sizes that were tested, in their order; the last `accepted` one is the smallest that is proved.

    Args:
        sizes: from the largest down, in an order that does not depend on the rows.
        batches: of all held-out rows.
    """
    candidates: list[Candidate] = []
    for size in sizes:
        candidates.append(_look_at(size, limit, ask, batches))
        if not candidates[-1].accepted:
            break
    for place in reversed(range(len(candidates))):
        size = candidates[place]
        if size.accepted and size.proof is not None and size.proof.batches < batches:
            candidates[place] = size = with_proof(size, limit, ask(size, 1.0))
        if size.accepted:
            break
    return candidates


def with_proof(size: Candidate, limit: Tolerance, comparison: Comparison, doubt: float = DOUBT) -> Candidate:
    """Return the size with its measurement, and whether it is within the tolerance."""
    return replace(size, proof=comparison, accepted=limit.allows(comparison, doubt))


def _look_at(size: Candidate, limit: Tolerance, ask: Ask, batches: int) -> Candidate:
    """Measure the size on as many rows as it takes to tell."""
    if limit.of == "accuracy" or math.floor(LOOKS[0][0] * batches) < FEW:
        return with_proof(size, limit, ask(size, 1.0))
    for part, doubt in LOOKS:
        result = with_proof(size, limit, comparison := ask(size, part), doubt)
        if result.accepted or limit.forbids(comparison, REJECTED):
            break
    return result

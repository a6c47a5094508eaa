"""The share of answers that change: its bounds against scipy's and against simulation, alone and in a whole search."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from closeness import close
from scipy import stats

from pedyra.fitting.heldout import Comparison
from pedyra.fitting.logits import Logits, per_token, row_answers, share_of
from pedyra.fitting.paired import Increase
from pedyra.fitting.search import search
from pedyra.fitting.share import Share
from pedyra.fitting.sizes import Candidate
from pedyra.fitting.verdict import Tolerance

TWO_PERCENT = Tolerance(Increase(0.0, 0.0, 2), 0.02, "answers")
SIZES = [Candidate(ranks={"q": rank}, parameters=rank, share=rank / 16, predicted=0.0) for rank in (8, 6, 4, 3, 2, 1)]
Draw = Callable[[np.random.Generator, int, float], Any]
"""The parts of so many rows' answers that change, of which the mean is this in truth."""


@pytest.mark.parametrize(("count", "rows"), [(0, 24), (1, 30), (7, 500), (47, 3000), (500, 500)])
def test_rows_of_one_answer_have_the_bounds_of_clopper_and_pearson(count: int, rows: int):
    share = Share.of([1.0] * count + [0.0] * (rows - count))
    test = stats.binomtest(count, rows)
    for level in (0.004, 0.05):
        exact = test.proportion_ci(1 - 2 * level, method="exact")
        assert (share.lower(level), share.upper(level)) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_two_percent_is_proved_by_47_changed_rows_of_3000_and_not_by_48():
    for count, allowed in ((47, True), (48, False)):
        found = Comparison(changed=Share.of([1.0] * count + [0.0] * (3000 - count)))
        assert TWO_PERCENT.allows(found) == allowed


def one(random: np.random.Generator, rows: int, share: float) -> Any:
    """A classifier's: each row has one answer."""
    return (random.random(rows) < share).astype(float)


def texts(random: np.random.Generator, rows: int, share: float) -> Any:
    """A language model's: of 20 to 200 tokens in a row, which depend on each other; most rows change in none."""
    tokens = random.integers(20, 200, rows)
    return random.binomial(tokens, random.beta(0.5, 0.5 * (1 - share) / share, rows)) / tokens


def short(random: np.random.Generator, rows: int, share: float) -> Any:
    """Three to seven tokens in a row."""
    tokens = random.integers(3, 8, rows)
    return random.binomial(tokens, random.beta(0.2, 0.2 * (1 - share) / share, rows)) / tokens


@pytest.mark.parametrize("draw", [one, texts, short])
@pytest.mark.parametrize("rows", [200, 1024], ids=["on all rows", "at three looks"])
def test_a_size_just_beyond_a_changed_tolerance_is_taken_in_one_fit_of_twenty(draw: Draw, rows: int):
    """Every size changes 2.01 % of the answers in truth."""
    random, fits, taken = np.random.default_rng(0), 250, 0
    for _ in range(fits):
        drawn = {size.rank: draw(random, rows, 0.0201) for size in SIZES}

        def ask(size: Candidate, part: float, drawn: dict[int, Any] = drawn) -> Comparison:
            seen = drawn[size.rank][: round(part * rows)]
            return Comparison(changed=Share.of(seen.tolist()), batches=round(part * rows / 8))

        taken += any(size.accepted for size in search(SIZES, TWO_PERCENT, ask, rows // 8))
    assert taken / fits <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / fits)


def test_rows_that_are_beyond_are_rejected_and_few_that_change_are_taken():
    shares = {8: 0.0, 6: 0.01, 4: 0.2}

    def ask(size: Candidate, part: float) -> Comparison:
        rows = round(part * 1024)
        return Comparison(changed=Share.of([1.0] * round(shares[size.rank] * rows) + [0.0] * rows), batches=rows // 8)

    assert [size.accepted for size in search(SIZES, TWO_PERCENT, ask, 128)] == [True, True, False]


def test_rows_are_compared_answer_by_answer():
    """Against the definition, of two rows with three and one answers, of which one and none change."""
    whole = torch.tensor([[3.0, 0, 0], [0, 2.0, 0], [0, 0, 1.0], [1.0, 0, 0]])
    smaller = torch.tensor([[2.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0], [2.0, 0, 0]])
    rows = torch.tensor([0, 0, 0, 2])  # the row between has none
    found = row_answers(Logits(whole, rows), Logits(smaller, rows))
    expected = [stats.entropy(p, q) for p, q in zip(whole.softmax(-1), smaller.softmax(-1), strict=True)]
    assert [(row.answers, row.changed) for row in found] == [(3, 1), (1, 0)]
    assert close(torch.tensor([row.divergence for row in found]), torch.tensor([sum(expected[:3]), expected[3]]))
    assert share_of(found).mean == pytest.approx((1 / 3 + 0) / 2)
    kld, same = per_token(found)
    assert kld.mean == pytest.approx(np.mean(expected), rel=1e-5) and same.mean == pytest.approx(3 / 4)

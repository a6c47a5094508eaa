"""Sums over the batches of a calibration: right whatever the loss is multiplied by, and however a batch comes."""

from __future__ import annotations

import pytest
import torch
from closeness import close
from torch import Tensor

from pedyra.fitting.gramians import Gramians, Sums

R, BATCHES, TOKENS = 3, 5, 8
A = {"a": torch.zeros(R, 7)}


def tokens(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, R, generator=generator), torch.randn(TOKENS, R, generator=generator)


def summed(scale: float = 1.0, pieces: int = 1, spoiled: int | None = None) -> Gramians:
    """Batches of 4 samples; their losses' gradients times `scale`, in so many calls of the layer, with padding."""
    gramians = Gramians(A)
    observe = gramians.observer("a")
    for batch in range(BATCHES):
        h, g = tokens(batch)
        if batch == spoiled:
            g = g * float("inf")
        for part_h, part_g in zip(h.chunk(pieces), g.chunk(pieces), strict=True):
            observe(torch.cat([part_h, torch.ones(3, R)]), torch.cat([part_g, torch.zeros(3, R)]) * scale / 4)
        gramians.close(torch.tensor(4.0), scale)
    return gramians


def expected(batches: range = range(BATCHES)) -> Sums:
    """By hand: each token once, with the gradient of the loss of one sample, and K of the mean loss of a batch."""
    h, g = zip(*map(tokens, batches), strict=True)
    P, Q = (torch.stack([each.T @ each for each in some]).sum(0) for some in (h, g))
    K = torch.stack([a.T @ b / 4 for a, b in zip(h, g, strict=True)])
    return Sums(P, Q, K, float(TOKENS * len(batches)))


def same(found: Sums, other: Sums) -> bool:
    return all(close(a, b) for a, b in zip(found[:3], other[:3], strict=True)) and found.tokens == other.tokens


@pytest.mark.parametrize("case", [{}, {"scale": 1024.0}, {"pieces": 4}], ids=["as it is", "scaled", "in pieces"])
def test_the_sums_are_those_of_a_loop(case):
    sums, samples = summed(**case).totals()
    assert same(sums["a"], expected()) and samples.tolist() == [4.0] * BATCHES


def test_of_many_batches_blocks_are_kept_whose_slopes_are_those_of_all_their_samples(monkeypatch):
    for name in ("BLOCKS", "FEWEST_BLOCKS"):
        monkeypatch.setattr(f"pedyra.fitting.gramians.{name}", 2)
    sums, samples = summed().totals()
    K = expected().K
    assert samples.tolist() == [8.0, 8.0, 4.0]
    assert same(sums["a"], expected()._replace(K=torch.stack([K[:2].mean(0), K[2:4].mean(0), K[4]])))


@pytest.mark.parametrize("r", [8, 64, 128])
def test_memory_of_many_batches_grows_little_with_the_rank(r):
    gramians = Gramians({"a": torch.zeros(r, 7), "b": torch.zeros(1, 7)})
    for _ in range(600):
        gramians.close(torch.tensor(1.0))
    sums, samples = gramians.totals()
    assert sums["a"].K.numel() <= (256 * 32**2 if r <= 64 else 2 * 16 * r**2) and len(samples) >= 16


def test_a_batch_that_is_not_finite_is_left_out():
    sums, samples = summed(spoiled=4).totals()
    assert same(sums["a"], expected(range(4))) and len(samples) == 4


def test_processes_are_joined(monkeypatch):
    """The sums of both, and the slopes of each batch of theirs."""
    monkeypatch.setattr("pedyra.fitting.gramians.gather_object", lambda own: own * 2)
    sums, samples = summed().totals()
    once = expected()
    twice = Sums(2 * once.P, 2 * once.Q, torch.cat([once.K, once.K]), 2 * once.tokens)
    assert same(sums["a"], twice) and len(samples) == 2 * BATCHES

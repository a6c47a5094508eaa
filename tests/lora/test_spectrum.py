"""Singular values against dense linear algebra, the effective rank by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pedyra.lora.spectrum import effective_rank, singular_values


@pytest.mark.parametrize("shape", [(3, 7, 5), (4, 3, 9), (6, 5, 4), (1, 2, 2)])
def test_singular_values_are_those_of_the_dense_update(shape):
    rank, width_in, width_out = shape
    A, E, B = torch.randn(rank, width_in), torch.randn(rank), torch.randn(width_out, rank)
    dense = torch.linalg.svdvals(B @ torch.diag(E) @ A)
    ours = singular_values(A, E, B)
    num = min(len(ours), len(dense))
    assert torch.allclose(ours[:num], dense[:num], atol=1e-5)
    assert torch.allclose(dense[num:], torch.zeros(len(dense) - num), atol=1e-5)


def test_effective_rank_by_hand():
    assert effective_rank(torch.ones(4)) == pytest.approx(4.0)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1.0)
    p = [0.75, 0.25]
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))


def test_effective_rank_of_nothing_is_zero():
    assert effective_rank(torch.zeros(3)) == 0.0
    assert effective_rank(singular_values(torch.zeros(0, 4), torch.zeros(0), torch.zeros(5, 0))) == 0.0


def test_what_is_not_finite_has_no_effective_rank():
    assert math.isnan(effective_rank(torch.tensor([1.0, torch.nan])))

"""Singular values of a LoRA's update against those of the dense matrix, and the effective rank by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pedyra.lora.singular import effective_rank, singular, singular_values


@pytest.mark.parametrize(("out", "r", "into"), [(20, 6, 30), (30, 6, 8), (5, 6, 30), (7, 1, 9)])
def test_the_truncation_is_that_of_the_dense_matrix(out: int, r: int, into: int):
    torch.manual_seed(0)
    A, B = torch.randn(r, into), torch.randn(out, r)
    result = singular(A, B)
    U, values, V = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
    count = len(result.values)
    assert torch.allclose(result.values, values[:count], atol=1e-9)
    for rank in range(1, count + 1):
        rows, columns = result.factors(rank)
        assert torch.allclose(columns @ rows, U[:, :rank] * values[:rank] @ V[:rank], atol=1e-9)


def test_energy_says_the_fewest_directions():
    result = singular(torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.eye(3))  # energies of 9, 4 and 1
    assert [result.rank_of_energy(part) for part in (0.1, 9 / 14 + 0.01, 13 / 14 + 0.01, 1.0)] == [1, 2, 3, 3]
    assert result.kept(1) == pytest.approx(9 / 14)
    zeros = singular(torch.zeros(2, 4), torch.zeros(3, 2))
    assert zeros.rank_of_energy(0.9) == 1 and zeros.kept(1) == 1


@pytest.mark.parametrize("shape", [(3, 7, 5), (4, 3, 9), (6, 5, 4), (1, 2, 2)])
def test_singular_values_are_those_of_the_dense_update(shape):
    rank, width_in, width_out = shape
    A, B = torch.randn(rank, width_in), torch.randn(width_out, rank)
    dense = torch.linalg.svdvals(B @ A)
    ours = singular_values(A, B)
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
    assert effective_rank(singular_values(torch.zeros(0, 4), torch.zeros(5, 0))) == 0.0


def test_what_is_not_finite_has_no_effective_rank():
    assert math.isnan(effective_rank(torch.tensor([1.0, torch.nan])))

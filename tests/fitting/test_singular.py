"""Singular values of a LoRA's update, against those of the dense matrix."""

from __future__ import annotations

import pytest
import torch

from pedyra.fitting.singular import singular


@pytest.mark.parametrize(("out", "r", "into"), [(20, 6, 30), (30, 6, 8), (5, 6, 30), (7, 1, 9)])
def test_the_truncation_is_that_of_the_dense_matrix(out: int, r: int, into: int):
    torch.manual_seed(0)
    A, B = torch.randn(r, into), torch.randn(out, r)
    found = singular(A, B)
    U, values, V = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
    count = len(found.values)
    assert torch.allclose(found.values, values[:count], atol=1e-9)
    for rank in range(1, count + 1):
        rows, columns = found.factors(rank)
        assert torch.allclose(columns @ rows, U[:, :rank] * values[:rank] @ V[:rank], atol=1e-9)


def test_energy_says_the_fewest_directions():
    found = singular(torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.eye(3))  # energies of 9, 4 and 1
    assert [found.rank_of_energy(part) for part in (0.1, 9 / 14 + 0.01, 13 / 14 + 0.01, 1.0)] == [1, 2, 3, 3]
    assert found.kept(1) == pytest.approx(9 / 14)
    zeros = singular(torch.zeros(2, 4), torch.zeros(3, 2))
    assert zeros.rank_of_energy(0.9) == 1 and zeros.kept(1) == 1

"""Eq. (2) against loops and by hand; its closed-form gradient against autograd."""

from __future__ import annotations

import pytest
import torch
from closeness import same_bits

from pedyra.pe_dyra.orthogonality import orthogonality, orthogonality_gradient

FORMS = ["norm", "squared"]


def test_eq2_equals_its_loops():
    rows = torch.randn(3, 5)
    squared = 0.0
    for i in range(3):
        for j in range(3):
            product = sum(float(rows[i, k]) * float(rows[j, k]) for k in range(5))
            squared += (product - (1.0 if i == j else 0.0)) ** 2
    assert float(orthogonality(rows, form="squared")) == pytest.approx(squared, rel=1e-5)
    assert float(orthogonality(rows, form="norm")) == pytest.approx(squared**0.5, rel=1e-5)


def test_eq2_by_hand():
    rows = torch.tensor([[2.0, 0.0], [0.0, 1.0]])  # M M^T - I = diag(3, 0)
    assert float(orthogonality(rows, form="squared")) == 9.0
    assert float(orthogonality(rows, form="norm")) == 3.0
    assert orthogonality_gradient(rows, form="squared").tolist() == [[24.0, 0.0], [0.0, 0.0]]
    assert orthogonality_gradient(rows, form="norm").tolist() == [[4.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 5), (1, 4), (5, 3), (2, 3, 5)])
def test_the_gradient_equals_autograd(form, shape):
    rows = torch.randn(shape, requires_grad=True)
    (expected,) = torch.autograd.grad(orthogonality(rows, form=form).sum(), rows)
    assert torch.allclose(orthogonality_gradient(rows.detach(), form=form), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_orthonormal_rows_have_neither_penalty_nor_gradient(form):
    rows = torch.eye(3, 6)
    assert float(orthogonality(rows, form=form)) == 0.0
    assert torch.count_nonzero(orthogonality_gradient(rows, form=form)) == 0


@pytest.mark.parametrize("form", FORMS)
def test_zero_rows_are_a_stationary_point(form):
    assert torch.count_nonzero(orthogonality_gradient(torch.zeros(2, 4), form=form)) == 0


def test_half_precision_factors_are_penalised_in_float32():
    rows = torch.randn(3, 5, dtype=torch.bfloat16)
    assert orthogonality(rows, form="norm").dtype == torch.float32
    assert same_bits(orthogonality(rows, form="norm"), orthogonality(rows.float(), form="norm"))

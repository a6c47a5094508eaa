"""The basis and its slopes against brute force: a quadratic with known Hessian, finite differences of gates,
and explicit removal."""

from __future__ import annotations

import math

import pytest
import torch

from pedyra.fitting.balance import balance, in_basis
from pedyra.fitting.paired import paired
from pedyra.fitting.sizes import predicted_increase

R = 5


def gramians(seed: int = 0, rank: int = R) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(400, rank, generator=generator) @ torch.randn(rank, R, generator=generator)
    g = torch.randn(400, R, generator=generator) @ torch.randn(R, R, generator=generator)
    return h.T @ h / 400, g.T @ g / 400


def test_both_gramians_become_the_same_diagonal():
    P, Q = gramians()
    T, inverse, values = balance(P, Q)
    torch.testing.assert_close(T @ P.double() @ T.T, torch.diag(values), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inverse.T @ Q.double() @ inverse, torch.diag(values), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(T @ inverse, torch.eye(R).double(), rtol=0, atol=1e-9)
    # s^2 are the eigenvalues of P Q, whatever the basis.
    expected = torch.linalg.eigvals(P.double() @ Q.double()).real.sort(descending=True).values
    torch.testing.assert_close(values.square(), expected, rtol=1e-4, atol=0)


def test_another_basis_of_the_same_update_has_the_same_values():
    P, Q = gramians(1)
    W = torch.randn(R, R, generator=torch.Generator().manual_seed(2)).double()
    inverse = torch.linalg.inv(W)
    turned = balance(W @ P.double() @ W.T, inverse.T @ Q.double() @ inverse).values
    torch.testing.assert_close(turned, balance(P, Q).values, rtol=1e-4, atol=0)


@pytest.mark.parametrize("rank", [0, 3])
def test_directions_that_see_nothing_are_worth_nothing_and_break_nothing(rank):
    P, Q = gramians(3, rank) if rank else (torch.zeros(R, R), torch.zeros(R, R))
    T, inverse, values = balance(P, Q)
    torch.testing.assert_close(T @ inverse, torch.eye(R).double(), rtol=0, atol=1e-4)
    assert values.isfinite().all() and (values[rank:] <= 1e-3 * max(float(values[0]), 1e-20)).all()


def test_a_slope_is_the_derivative_of_the_loss_along_a_gate():
    generator = torch.Generator().manual_seed(4)
    A, B = torch.randn(R, 7, generator=generator).double(), torch.randn(6, R, generator=generator).double()
    x, y = torch.randn(20, 7, generator=generator).double(), torch.randn(20, 6, generator=generator).double()
    h = x @ A.T
    g = 2 * (h @ B.T - y) @ B / 20  # of the mean over rows of |B h - y|^2
    basis = balance(h.T @ h, g.T @ g)
    slopes = in_basis((h.T @ g)[None], basis)[0].diagonal()

    def loss(z: torch.Tensor) -> float:
        M = basis.inverse @ torch.diag(z) @ basis.T
        return float((h @ M.T @ B.T - y).square().sum(1).mean())

    for i in range(R):
        up, down = torch.ones(R).double(), torch.ones(R).double()
        up[i] += 1e-5
        down[i] -= 1e-5
        assert slopes[i] == pytest.approx((loss(up) - loss(down)) / 2e-5, rel=1e-4, abs=1e-7)


def test_the_cost_of_a_set_is_what_its_removal_costs_where_the_model_is_right():
    """A well-specified regression at its optimum: noise of variance 1, so that the Fisher information is the Hessian of
    -log likelihood, |y - B h|^2 / 2. Directions share work (correlated h), which single directions would not show."""
    generator = torch.Generator().manual_seed(5)
    rows, batch = 200_000, 50
    mix = torch.eye(3).double() + 0.8 * torch.randn(3, 3, generator=generator).double()
    h = torch.randn(rows, 3, generator=generator).double() @ mix
    B = torch.tensor([0.3, -0.2, 0.1]).double()
    noise = torch.randn(rows, generator=generator).double()
    g = -noise[:, None] * B  # d/dh of |y - B h|^2 / 2 at the true B, of one row
    K = torch.stack([h[i : i + batch].T @ g[i : i + batch] / batch for i in range(0, rows, batch)])
    basis = balance(h.T @ h / rows, g.T @ g / rows)
    slopes = in_basis(K, basis).diagonal(dim1=1, dim2=2)
    samples = torch.full((len(K),), float(batch)).double()
    for removed in ([2], [1, 2], [0, 1, 2]):
        keep = torch.ones(3).double()
        keep[removed] = 0
        M = basis.inverse @ torch.diag(keep) @ basis.T
        truth = float(((h - h @ M.T) @ B).square().mean() / 2)
        c = slopes[:, removed].sum(1)
        error = paired([0.0] * len(c), c.tolist(), samples.tolist()).error
        assert predicted_increase(c, samples) == pytest.approx(truth, abs=4 * error + 0.05 * truth)
    alone = basis.values.square()
    # One output: all of g lies along B, so one balanced direction holds everything.
    assert alone[1:].sum() < 1e-3 * alone[0]


def test_without_directions_that_undo_each_other_nothing_rises():
    c = torch.randn(300, generator=torch.Generator().manual_seed(6)).double()
    samples = torch.full((300,), 8.0).double()
    assert predicted_increase(c, samples) > 3
    assert predicted_increase(c - c, samples) == 0


def test_the_predicted_increase_by_hand():
    """Slopes 1 and 3 of batches of 2 samples: mean 2, variance of a sample 2 * 2 = 4, so 4 / 2 - 2 = 0."""
    assert predicted_increase(torch.tensor([1.0, 3.0]).double(), torch.tensor([2.0, 2.0]).double()) == 0.0
    assert math.isnan(predicted_increase(torch.tensor([1.0]).double(), torch.tensor([2.0]).double()))

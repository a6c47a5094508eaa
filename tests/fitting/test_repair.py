"""Repair against what is known without it: a quadratic whose optimum has a closed form, gates that copy each other, and
a small regression whose loss is measured before and after."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pedyra.fitting.balance import Balance, in_basis
from pedyra.fitting.repair import compensation, mixings


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(rank: int) -> Balance:
    """The directions as they are stored."""
    return Balance(torch.eye(rank).double(), torch.eye(rank).double(), torch.ones(rank).double())


@pytest.mark.parametrize("batches", [40, 6], ids=["more batches than parameters", "fewer"])
def test_kept_parameters_go_where_the_loss_is_least(batches: int):
    S, removed = drawn(batches, 9), drawn(batches, seed=1)
    found = compensation(S, removed, damping=0.01)
    # The gradient of |S d - removed|^2 + c |d|^2 is zero, with the singular values taken as they are.
    ridge = 0.01 * torch.linalg.svdvals(S).square().mean()
    torch.testing.assert_close(S.T @ (S @ found - removed) + ridge * found, torch.zeros(9).double(), rtol=0, atol=1e-9)


def test_without_damping_the_rise_is_that_of_the_constrained_minimum():
    S, removed = drawn(40, 12), [9, 10, 11]
    F = S.T @ S
    moves = -torch.ones(12).double()
    moves[:9] = compensation(S[:, :9], S[:, removed].sum(1), damping=1e-12)
    # Schur: without the freedom of the kept, the rise of d^T F d / 2 is 1^T (F / F_kk) 1 / 2.
    schur = F[9:, 9:] - F[9:, :9] @ torch.linalg.solve(F[:9, :9], F[:9, 9:])
    torch.testing.assert_close(moves @ F @ moves / 2, schur.sum() / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 3), (5, 0)])
def test_where_nothing_is_known_or_nothing_stays_nothing_moves(shape: tuple[int, int]):
    found = compensation(torch.zeros(shape), torch.zeros(shape[0]))
    assert not found.any() and len(found) == shape[1]
    assert not compensation(torch.zeros(4, 3), torch.ones(4)).any()


def test_a_direction_that_is_there_twice_takes_the_place_of_its_copy():
    h = drawn(30, 1).expand(30, 3) * torch.tensor([1.0, 1.0, 0.0]).double()  # the third never fires
    g = drawn(30, 1, seed=1).expand(30, 3)
    K = torch.einsum("bi,bj->bij", h, g)
    found = mixings({"a": K}, torch.full((30,), 8.0), {"a": 1}, damping=1e-9)
    torch.testing.assert_close(found["a"], torch.ones(1, 1).double(), rtol=0, atol=1e-6)


def test_the_basis_is_one_matter_and_the_mixed_update_another():
    """Two bases of the same kept span: without damping the repaired update is the same."""
    K, samples = drawn(200, 4, 4), torch.full((200,), 8.0)
    A, B = drawn(4, 7, seed=2), drawn(6, 4, seed=3)
    W = torch.block_diag(drawn(2, 2, seed=4), torch.eye(2).double())
    turned = Balance(W, torch.linalg.inv(W), torch.ones(4).double())
    updates = []
    for basis in (plain(4), turned):
        M = mixings({"a": in_basis(K, basis)}, samples, {"a": 2}, damping=1e-12)["a"]
        updates.append(B @ basis.inverse[:, :2] @ (torch.eye(2) + M) @ basis.T[:2] @ A)
    torch.testing.assert_close(*updates, rtol=1e-6, atol=1e-9)


def regression() -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    """A and B of two layers that are added up, at the minimum of the loss, their inputs and their targets."""
    x, noise = drawn(4000, 8), drawn(4000, 5, seed=9)
    A = {"a": drawn(3, 8, seed=1), "b": drawn(3, 8, seed=2)}
    B = {"a": drawn(5, 3, seed=3), "b": drawn(5, 3, seed=4)}
    A["b"][0] = A["a"][2] + 0.1 * A["b"][0]  # what one layer loses the other has nearly
    return A, B, x, said(A, B, x) + noise


def said(A: dict[str, Tensor], B: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.stack([x @ A[name].T @ B[name].T for name in A]).sum(0)


def test_a_cut_regression_loses_nearly_as_little_after_repair_as_any_mixing_could():
    A, B, x, y = regression()
    g = said(A, B, x) - y  # of |B A x - y|^2 / 2, row by row, whose noise has unit variance: the Fisher information
    products = {name: torch.einsum("bi,bj->bij", x @ A[name].T, g @ B[name]) for name in A}
    ranks = {"a": 2, "b": 2}

    def loss(M: dict[str, Tensor]) -> float:
        left = {name: B[name][:, :2] @ (torch.eye(2) + M[name]) for name in B}
        return float((said({name: each[:2] for name, each in A.items()}, left, x) - y).square().sum(1).mean() / 2)

    none = {name: torch.zeros(2, 2).double() for name in A}
    cut, mixed = loss(none), loss(mixings(products, torch.ones(len(x)), ranks))
    # The least that any M reaches is that of a linear regression on the eight numbers B_i h_j of each layer.
    columns = [(x @ A[n][j])[:, None] * B[n][:, i] for n in A for i in range(2) for j in range(2)]
    design = torch.stack(columns, -1).reshape(-1, 8)
    best = torch.linalg.lstsq(design, y.reshape(-1, 1)).solution
    least = float((design @ best - y.reshape(-1, 1)).square().sum() / len(x) / 2)
    assert least <= mixed < cut
    assert mixed - least < 0.1 * (cut - least)

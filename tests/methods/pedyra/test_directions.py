"""New directions: orthogonal where there is room, of the asked length, and a function of the generator alone."""

from __future__ import annotations

import pytest
import torch

from pedyra.methods.pedyra.directions import gaussian_rows, orthogonal_rows, singular_turn


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("rank", "num"), [(3, 1), (3, 2), (3, 5), (0, 2), (1, 7)])
def test_orthogonal_rows_are_orthogonal_to_the_old_and_to_each_other(rank, num):
    rows = torch.randn(rank, 8)
    new = orthogonal_rows(rows, num, norm=2.5, generator=generator())
    assert new.shape == (num, 8)
    assert torch.allclose(new @ rows.T, torch.zeros(num, rank), atol=1e-5)
    assert torch.allclose(new @ new.T, 2.5**2 * torch.eye(num), atol=1e-4)


def test_more_rows_than_dimensions_keep_their_length():
    new = orthogonal_rows(torch.randn(3, 4), 3, norm=1.5, generator=generator())
    assert torch.allclose(new.norm(dim=1), torch.full((3,), 1.5), atol=1e-5)
    full = orthogonal_rows(torch.randn(4, 4), 2, norm=1.5, generator=generator())
    assert torch.allclose(full.norm(dim=1), torch.full((2,), 1.5), atol=1e-5)


def test_rows_that_already_depend_on_each_other_are_still_avoided():
    rows = torch.randn(1, 6).repeat(2, 1)
    new = orthogonal_rows(rows, 2, norm=1.0, generator=generator())
    assert torch.allclose(new @ rows.T, torch.zeros(2, 2), atol=1e-5)


def test_half_precision_rows_are_accepted():
    rows = torch.randn(2, 8, dtype=torch.bfloat16)
    new = orthogonal_rows(rows, 1, norm=1.0, generator=generator())
    assert new.dtype == torch.float32 and float((new @ rows.float().T).abs().max()) < 1e-5


def test_gaussian_rows_have_the_asked_spread():
    rows = gaussian_rows(200, 50, std=0.02, generator=generator())
    assert float(rows.std()) == pytest.approx(0.02, rel=0.03)
    assert float(rows.mean()) == pytest.approx(0.0, abs=1e-3)


def test_the_same_seed_gives_the_same_rows_and_no_global_draw():
    before = torch.get_rng_state()
    for draw in (
        lambda seed: gaussian_rows(2, 5, std=1.0, generator=generator(seed)),
        lambda seed: orthogonal_rows(torch.eye(1, 5), 2, norm=1.0, generator=generator(seed)),
    ):
        assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_turn_makes_the_triples_the_svd_of_their_product():
    torch.manual_seed(0)
    A, B = torch.randn(4, 12), torch.randn(9, 4)
    B[:, 3] = B[:, 0]  # of rank 3: two triples share a direction, and no column is short
    W = singular_turn(A, B)
    new_A, new_B = W @ A, B @ torch.linalg.inv(W)
    assert torch.allclose(new_B @ new_A, B @ A, atol=1e-5)
    length = A.norm(dim=1).mean()
    assert torch.allclose(new_A @ new_A.T, length**2 * torch.eye(4), atol=1e-3)
    strengths = new_B.norm(dim=0) * new_A.norm(dim=1)
    assert torch.allclose(strengths, torch.linalg.svdvals(B @ A)[:4], atol=1e-4)
    assert strengths[3] < 1e-4 < B.norm(dim=0).min() * A.norm(dim=1).min()


@pytest.mark.parametrize("broken", ["A", "B"])
def test_factors_that_are_not_finite_give_no_finite_turn(broken):
    A, B = torch.randn(3, 8), torch.randn(5, 3)
    (A if broken == "A" else B)[0, 0] = torch.nan  # torch's SVD raises on these
    assert not singular_turn(A, B).isfinite().all()


def test_rows_that_depend_on_each_other_give_no_finite_turn():
    A = torch.randn(3, 8)
    A[2] = 0
    assert not singular_turn(A, torch.randn(5, 3)).isfinite().all()

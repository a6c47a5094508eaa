"""Eq. (2) against loops and by hand; its closed-form gradient, and what a model gets of it, against autograd."""

from __future__ import annotations

import pytest
import torch
from closeness import same_bits
from torch import Tensor

from pedyra.allocate.orthogonality import (
    add_orthogonality_gradient,
    layer_orthogonality,
    orthogonality,
    orthogonality_gradient,
)
from pedyra.lora.attach import attach
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.replacement import put_replacements, replacements_of

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


def penalty(layers: list[AdaptedLayer], form: str) -> Tensor:
    """Written out: sum over layers of ||A A^T - I||^2 + ||B^T B - I||^2; AdaLoRA's: the mean of the norms."""
    terms = []
    for layer in layers:
        for rows in (layer.a.A, layer.b.weight.T):
            norm = (rows @ rows.T - torch.eye(len(rows))).norm()
            terms.append(norm**2 if form == "squared" else norm)
    return torch.stack(terms).sum() if form == "squared" else torch.stack(terms).mean()


@pytest.mark.parametrize("form", FORMS)
def test_adds_the_gradient_of_the_penalty(form, make_net):
    layers = attach(make_net(trained=True, rank_pattern={"1": 2}))
    factors = [factor for layer in layers for factor in (layer.a.A, layer.b.weight)]
    expected = torch.autograd.grad(0.3 * penalty(layers, form), factors)
    task = [torch.randn_like(factor) for factor in factors]
    for factor, grad in zip(factors, task, strict=True):
        factor.grad = grad.clone()
    add_orthogonality_gradient(layers, weight=0.3, form=form)
    for factor, grad, ours in zip(factors, task, expected, strict=True):
        assert factor.grad is not None and torch.allclose(factor.grad, grad + ours, rtol=1e-4, atol=1e-5)
    assert all(layer.a.E.grad is None for layer in layers)


@pytest.mark.parametrize("form", FORMS)
def test_the_ratio_is_of_the_norms_of_all_factors_together(form, make_net):
    layers = attach(make_net(trained=True, rank_pattern={"1": 2}))
    factors = [factor for layer in layers for factor in (layer.a.A, layer.b.weight)]
    expected = torch.autograd.grad(0.3 * penalty(layers, form), factors)
    task = [torch.randn_like(factor) for factor in factors]
    for factor, grad in zip(factors, task, strict=True):
        factor.grad = grad.clone()
    assert add_orthogonality_gradient(layers, weight=0.0, form=form) is None
    ratio = add_orthogonality_gradient(layers, weight=0.3, form=form, measure=True)
    sizes = [torch.cat([grad.flatten() for grad in grads]).norm() for grads in (expected, task)]
    assert ratio is not None and float(ratio) == pytest.approx(float(sizes[0] / sizes[1]), rel=1e-4)


def test_a_missing_gradient_becomes_the_penaltys_alone(make_net):
    layers = attach(make_net(trained=True))
    add_orthogonality_gradient(layers, weight=1.0, form="squared")
    (expected,) = torch.autograd.grad(penalty(layers, "squared"), [layers[0].a.A])
    assert layers[0].a.A.grad is not None and torch.allclose(layers[0].a.A.grad, expected, rtol=1e-4, atol=1e-5)


def test_layers_of_rank_zero_have_no_penalty(make_net):
    layers = attach(make_net(trained=True))
    put_replacements([(layers[0], replacements_of(layers[0], range(4), None))])
    add_orthogonality_gradient(layers, weight=1.0, form="norm")
    # The mean is over the matrices of all layers, the empty one's too, whose norm is 0.
    (expected,) = torch.autograd.grad(penalty(layers[1:], "norm") * 4 / 6, [layers[1].a.A])
    assert layers[1].a.A.grad is not None and torch.allclose(layers[1].a.A.grad, expected, rtol=1e-4, atol=1e-6)
    assert layer_orthogonality(layers, form="norm")[layers[0].name] == [0.0, 0.0]


def test_the_logged_values_are_the_two_norms(make_net):
    layers = attach(make_net(trained=True))
    values = layer_orthogonality(layers, form="norm")
    A, B = layers[1].a.A.detach(), layers[1].b.weight.detach()
    assert values["layers.1"] == pytest.approx(
        [float((A @ A.T - torch.eye(4)).norm()), float((B.T @ B - torch.eye(4)).norm())], rel=1e-5
    )


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_have_diverged_get_no_gradient_that_is_not_finite(form, make_net):
    layers = attach(make_net(trained=True))
    with torch.no_grad():
        layers[0].a.A[1, 2] = 1e30
    add_orthogonality_gradient(layers, weight=0.3, form=form)
    factors = [factor for layer in layers for factor in (layer.a.A, layer.b.weight)]
    assert all(factor.grad is not None and factor.grad.isfinite().all() for factor in factors)
    assert layers[1].a.A.grad is not None and layers[1].a.A.grad.any()

"""Eq. (2) over a model: what is added to `.grad` is autograd's gradient of the penalty, and its value is logged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pedyra.lora.attach import attach
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.resize import install, resized
from pedyra.pe_dyra.orthogonality import add_orthogonality_gradient, layer_orthogonality


def penalty(layers: list[AdaptedLayer], form: str) -> Tensor:
    """Written out: sum over layers of ||A A^T - I||^2 + ||B^T B - I||^2; AdaLoRA's: the mean of the norms."""
    terms = []
    for layer in layers:
        for rows in (layer.a.A, layer.b.weight.T):
            norm = (rows @ rows.T - torch.eye(len(rows))).norm()
            terms.append(norm**2 if form == "squared" else norm)
    return torch.stack(terms).sum() if form == "squared" else torch.stack(terms).mean()


@pytest.mark.parametrize("form", ["norm", "squared"])
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


def test_a_missing_gradient_becomes_the_penaltys_alone(make_net):
    layers = attach(make_net(trained=True))
    add_orthogonality_gradient(layers, weight=1.0, form="squared")
    (expected,) = torch.autograd.grad(penalty(layers, "squared"), [layers[0].a.A])
    assert layers[0].a.A.grad is not None and torch.allclose(layers[0].a.A.grad, expected, rtol=1e-4, atol=1e-5)


def test_layers_of_rank_zero_have_no_penalty(make_net):
    layers = attach(make_net(trained=True))
    install([(layers[0], resized(layers[0], range(4), None))])
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


@pytest.mark.parametrize("form", ["norm", "squared"])
def test_rows_that_have_diverged_get_no_gradient_that_is_not_finite(form, make_net):
    layers = attach(make_net(trained=True))
    with torch.no_grad():
        layers[0].a.A[1, 2] = 1e30
    add_orthogonality_gradient(layers, weight=0.3, form=form)
    factors = [factor for layer in layers for factor in (layer.a.A, layer.b.weight)]
    assert all(factor.grad is not None and factor.grad.isfinite().all() for factor in factors)
    assert layers[1].a.A.grad is not None and layers[1].a.A.grad.any()

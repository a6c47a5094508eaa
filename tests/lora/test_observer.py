"""An observer sees h = x (E A)^T and its gradient, of every token once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from pedyra.lora.attach import attach
from pedyra.lora.layer import adapted_layers


@pytest.fixture
def model(make_net) -> Any:
    """An attached model, with E off its start."""
    model = make_net(trained=True)
    for layer in attach(model):
        with torch.no_grad():
            layer.a.E.copy_(torch.linspace(0.5, 1.5, len(layer.a.E)))
    return model


def watch(model: Any) -> dict[str, list[Tensor]]:
    """Layer -> sums of h^T g and g^T g `(r, r)`, of every call that is seen."""
    seen: dict[str, list[Tensor]] = {}
    for layer in adapted_layers(model):

        def see(h: Tensor, g: Tensor, name: str = layer.name) -> None:
            h, g = h.flatten(0, -2).float(), g.flatten(0, -2).float()
            old = seen.get(name, [torch.zeros(()), torch.zeros(())])
            seen[name] = [old[0] + h.T @ g, old[1] + g.T @ g]

        layer.a.observer = see
    return seen


@pytest.mark.parametrize("rows", [2, 40, (8, 5)])
def test_h_and_its_gradient_give_the_gradient_of_A(rows, model):
    """h^T g = E A (dL/d(E A))^T, which autograd knows."""
    shape = (rows, 8) if isinstance(rows, int) else (*rows, 8)
    seen = watch(model)
    model(torch.randn(*shape, generator=torch.Generator().manual_seed(4))).square().sum().backward()
    assert len(seen) == 3
    for layer in adapted_layers(model):
        A, E = layer.a.A, layer.a.E.detach()[:, None]
        assert A.grad is not None
        torch.testing.assert_close(seen[layer.name][0], (E * A.detach()) @ (A.grad / E).T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_shows_every_token_once(reentrant, make_bert, tokens, checkpoint_activations):
    found = []
    for checkpointed in (False, True):
        model = make_bert()
        attach(model)
        if checkpointed:
            checkpoint_activations(model, reentrant)
        seen = watch(model.train())
        model(**tokens, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        found.append(seen)
    assert found[0].keys() == found[1].keys()
    for name, sums in found[0].items():
        for value, again in zip(sums, found[1][name], strict=True):
            torch.testing.assert_close(again, value, rtol=1e-4, atol=1e-7)


def test_nothing_is_seen_without_a_gradient_or_in_a_copy(model):
    seen = watch(model)
    with torch.no_grad():
        model(torch.randn(4, 8))
    copy.deepcopy(model)(torch.randn(4, 8)).square().sum().backward()
    assert not seen

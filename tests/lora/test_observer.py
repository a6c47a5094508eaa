"""An observer sees h = x (E A)^T and its gradient, whatever forward computes a layer, and once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fused_pairs import pair
from torch import Tensor

from pedyra.lora.attach import attach
from pedyra.lora.layer import adapted_layers

pytestmark = pytest.mark.usefixtures("fuse_small_layers_too")


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
def test_h_and_its_gradient_give_the_gradient_of_A(rows, make_net, calls):
    """h^T g = E A (dL/d(E A))^T, which autograd knows, in PEFT's forward and in both fused ones."""
    shape = (rows, 8) if isinstance(rows, int) else (*rows, 8)
    for model in pair(make_net, trained=True):
        seen = watch(model)
        model(torch.randn(*shape, generator=torch.Generator().manual_seed(4))).square().sum().backward()
        assert len(seen) == 3
        for layer in adapted_layers(model):
            A, E = layer.a.A, layer.a.E.detach()[:, None]
            assert A.grad is not None
            torch.testing.assert_close(seen[layer.name][0], (E * A.detach()) @ (A.grad / E).T, rtol=1e-4, atol=1e-5)
    assert calls  # the second of the pair is fused


def test_the_squares_are_the_same_in_every_forward(make_net):
    plain, fused = pair(make_net, trained=True)
    x, seen = torch.randn(40, 8), []
    for model in (plain, fused):
        seen.append(watch(model))
        model(x).square().sum().backward()
    for name, (_, squares) in seen[0].items():
        torch.testing.assert_close(seen[1][name][1], squares, rtol=1e-4, atol=1e-5)


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


def test_nothing_is_seen_without_a_gradient_or_in_a_copy(make_net):
    _, model = pair(make_net, trained=True)
    seen = watch(model)
    with torch.no_grad():
        model(torch.randn(4, 8))
    copy.deepcopy(model)(torch.randn(4, 8)).square().sum().backward()
    assert not seen

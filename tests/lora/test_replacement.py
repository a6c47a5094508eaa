"""Resizing one layer: an expansion changes no function, a prune takes away exactly the pruned triples' part."""

from __future__ import annotations

import pytest
import torch
from closeness import same_bits

from pedyra.lora.attach import attach, train_e
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.replacement import NewTriples, put_factors, put_replacements, replacements_of


def resize(layer: AdaptedLayer, pruned=(), new: NewTriples | None = None) -> None:
    put_replacements([(layer, replacements_of(layer, pruned, new))])


def fresh(layer: AdaptedLayer, num: int, start: str) -> NewTriples:
    A, B = torch.randn(num, layer.a.in_features), torch.randn(layer.b.out_features, num)
    if start == "lora":
        return NewTriples(A, torch.ones(num), torch.zeros_like(B))
    return NewTriples(A, torch.zeros(num), B)


@pytest.mark.parametrize("start", ["lora", "svd"])
@pytest.mark.parametrize("num", [1, 3, 4])
def test_an_expansion_adds_exactly_nothing(start, num, make_net):
    # Small integers: every product and sum is exact, so any order in which a kernel adds must give the same bits.
    layer = attach(make_net())[0]
    x = torch.randint(-8, 8, (5, 8)).float()
    with torch.no_grad():
        for parameter in (*layer.module.base_layer.parameters(), layer.a.A, layer.a.E, layer.b.weight):
            parameter.copy_(torch.randint(-4, 5, parameter.shape))
    before = layer.module(x)
    resize(layer, new=fresh(layer, num, start))
    assert same_bits(layer.module(x), before)


def test_an_e_that_is_not_one_is_part_of_the_forward_again(make_net):
    layer = attach(make_net(trained=True))[0]
    train_e([layer], False)
    x = torch.randn(3, 8)
    at_one = layer.module(x)
    E = torch.full((layer.rank,), 3.0)
    put_factors([(layer, (layer.a.A, E, layer.b.weight))])
    base = layer.module.base_layer(x)
    assert not layer.a.e_fixed_at_one and torch.allclose(layer.module(x) - base, 3 * (at_one - base), atol=1e-5)

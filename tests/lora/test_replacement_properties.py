"""Chains of drawn resizes of one layer of two, against a list of triples that are dropped and appended one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from closeness import same_bits
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pedyra.lora.attach import attach, train_e
from pedyra.lora.replacement import NewTriples, put_replacements, replacements_of


class Triple(NamedTuple):
    a: Tensor
    e: Tensor
    b: Tensor


def drawn_layers(draw: Callable[[st.SearchStrategy], Any]) -> tuple[Any, Any, torch.Generator]:
    """The first of two adapted layers, its neighbour, and random numbers."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    size = st.integers(1, 9)
    base = nn.Sequential(nn.Linear(draw(size), draw(size), bias=draw(st.booleans())), nn.Linear(3, 3)).to(dtype)
    config = LoraConfig(
        r=draw(st.integers(1, 5)), lora_alpha=draw(st.integers(1, 8)), target_modules=["0", "1"], use_rslora=True
    )
    model: Any = get_peft_model(base, config, autocast_adapter_dtype=False)
    layer, neighbour = attach(model)
    with torch.no_grad():
        for factor in layer.factors:
            factor.copy_(torch.randn(factor.shape, generator=generator))
    if draw(st.booleans()):
        train_e([layer], False)
    if draw(st.booleans()):
        for factor in (layer.a.A, layer.b.weight):
            factor.requires_grad_(False)
    return layer, neighbour, generator


@given(st.data())
def test_survivors_keep_their_bits_order_and_function_and_the_pruned_are_gone(data):
    layer, neighbour, generator = drawn_layers(data.draw)
    A, E, B = (factor.detach() for factor in layer.factors)
    triples = [Triple(A[i].clone(), E[i].clone(), B[:, i].clone()) for i in range(layer.rank)]
    beside = [factor.detach().clone() for factor in neighbour.factors]
    x = torch.randn(4, A.shape[1], generator=generator).to(A)
    for _ in range(data.draw(st.integers(1, 4))):
        pruned = [i for i in range(layer.rank) if data.draw(st.booleans())]
        num_new = data.draw(st.integers(0, 3))
        new = None
        if num_new or data.draw(st.booleans()):
            shapes = (num_new, A.shape[1]), (num_new,), (B.shape[0], num_new)
            new = NewTriples(*(torch.randn(shape, generator=generator).to(A) for shape in shapes))
        before = layer.factors
        values = [factor.detach().clone() for factor in before]
        replaced = replacements_of(layer, pruned, new)
        put_replacements([(layer, replaced)])

        kept = [i for i in range(len(triples)) if i not in pruned]
        triples = [triples[i] for i in kept]
        if new is not None:
            triples += [Triple(new.A[i], new.E[i], new.B[:, i]) for i in range(num_new)]
        assert layer.rank == len(triples)
        for i, triple in enumerate(triples):
            assert same_bits(layer.a.A[i], triple.a)
            assert same_bits(layer.a.E[i], triple.e)
            assert same_bits(layer.b.weight[:, i], triple.b)
        for change, old, value, now in zip(replaced, before, values, layer.factors, strict=True):
            assert change.old is old and change.new is now and now is not old
            assert change.indices.tolist() == kept and change.num_new == num_new
            assert same_bits(old, value)  # what a graph from before may still need
            assert isinstance(now, nn.Parameter) == isinstance(old, nn.Parameter)
            assert (now.dtype, now.requires_grad) == (old.dtype, old.requires_grad)

        expected = layer.module.base_layer(x).double()
        for triple in triples:
            for row in range(len(x)):
                value = sum(float(p) * float(q) for p, q in zip(triple.a, x[row], strict=True))
                expected[row] += layer.scaling * float(triple.e) * value * triple.b.double()
        exact = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 0.1}[A.dtype]
        size = 1 + float(expected.detach().abs().max()) + 10 * len(triples)
        assert (layer.module(x).double() - expected).abs().max() <= exact * size
    assert all(same_bits(factor, value) for factor, value in zip(neighbour.factors, beside, strict=True))

"""torch.compile: the same training, and two graphs for a whole run whatever happens to the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from windows import forced, inside, take_step, trainable

from pedyra import PeDyra
from pedyra.allocate.allocation import RankPlan
from pedyra.allocate.rank_allocator import RankAllocator

STEPS = 16


@pytest.fixture(autouse=True)
def _fresh_compiler():
    import torch._dynamo

    before = torch._dynamo.config.force_parameter_static_shapes
    torch._dynamo.reset()
    yield
    torch._dynamo.config.force_parameter_static_shapes = before
    torch._dynamo.reset()


@pytest.fixture
def graphs() -> list[Any]:
    """The graphs that `counting` was asked to compile."""
    return []


@pytest.fixture
def counting(graphs) -> Callable[..., Any]:
    """A backend that runs what torch has captured as it is, and counts: what is captured anew is what costs."""

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend


def run(
    model: Any,
    forward: Any,
    tokens: dict[str, torch.Tensor],
    **settings: Any,
) -> RankAllocator:
    window: dict[str, Any] = {"interval": 3, "initial_warmup": 2, "final_warmup": 4, "moves": 3}
    given = forced(**{**window, "min_rank": 2, "beta1": 0.1, "beta2": 0.1, **settings})
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    allocator = RankAllocator(forward, optimizer, total_steps=STEPS, **given)
    model.train()
    for _ in range(STEPS):
        forward(**tokens, labels=tokens["input_ids"]).loss.backward()
        take_step(allocator)
    return allocator


def test_two_graphs_serve_a_run_and_train_as_eager_does(make_llama, tokens, counting, graphs):
    eager, compiled = make_llama(r=4, blocks=1), make_llama(r=4, blocks=1)
    expected = run(eager, eager, tokens)
    actual = run(compiled, torch.compile(compiled, backend=counting), tokens)
    assert len(graphs) == 2  # observed steps and the others
    assert actual.ranks == expected.ranks and len(actual.history) == 3
    assert len(set(actual.ranks.values())) > 1
    for (name, one), two in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-4), name
    for one, two in zip(inside(expected).scores.energies, inside(actual).scores.energies, strict=True):  # type: ignore[attr-defined]
        assert torch.allclose(one, two, rtol=1e-3)


def test_one_graph_where_inputs_are_not_observed(make_llama, tokens, counting, graphs):
    model = make_llama(r=4, blocks=1)
    allocator = run(model, torch.compile(model, backend=counting), tokens, alpha=1.0)
    assert len(graphs) == 1 and len(allocator.history) == 3


def test_a_model_compiled_in_place_counts_as_compiled(make_llama, tokens, counting, graphs):
    model = make_llama(r=4, blocks=1)
    model.compile(backend=counting)
    run(model, model, tokens)
    assert len(graphs) == 2


def test_a_scaling_that_is_halved_costs_no_graph(make_llama, tokens, counting, graphs):
    """In each of twelve layers in turn: torch gives up on a model after eight graphs."""
    eager, compiled = make_llama(r=4, blocks=2), make_llama(r=4, blocks=2)
    settings = {"interval": 2, "initial_warmup": 0, "final_warmup": 2, "moves": 0, "alpha": 1.0}
    forward: Any
    for model, forward in ((eager, eager), (compiled, torch.compile(compiled, backend=counting))):
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        allocator = RankAllocator(forward, optimizer, PeDyra(**settings), total_steps=STEPS)
        model.train()
        for layer in allocator.layers[:12]:
            forward(**tokens, labels=tokens["input_ids"]).loss.backward()
            take_step(allocator)
            allocator._carry_out(RankPlan({}, {layer.name: 4}, {**allocator.ranks, layer.name: 8}, {}))
        scaling = allocator.layers[-1].scaling
        assert [layer.scaling for layer in allocator.layers] == [scaling / 2] * 12 + [scaling] * 2
        allocator.release()
        assert all(isinstance(layer.module.scaling["default"], float) for layer in allocator.layers)
    assert len(graphs) == 1
    for (name, one), two in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-4), name

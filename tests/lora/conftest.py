"""Adapters at any ranks without an allocator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch


@pytest.fixture
def set_ranks() -> Callable[..., None]:
    """set_ranks(model, ranks): attach, and give each layer in turn this rank, with random triples."""
    from pedyra.lora.attach import attach, write_ranks
    from pedyra.lora.replacement import NewTriples, put_replacements, replacements_of

    def change(model: Any, ranks: Sequence[int]) -> None:
        generator = torch.Generator().manual_seed(9)
        layers = attach(model)
        for index, layer in enumerate(layers):
            rank = ranks[index % len(ranks)]
            num, new = rank - layer.rank, None
            if num > 0:
                draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.3  # noqa: E731
                new = NewTriples(draw(num, layer.a.in_features), draw(num), draw(layer.b.out_features, num))
            put_replacements([(layer, replacements_of(layer, range(rank, layer.rank), new))])
        write_ranks(model)

    return change

"""Peak memory of a training step: counted tensor by tensor on a CPU, asked of the allocator on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pedyra.lab.bench.bench_variants import Variant


def peak_bytes(variant: Variant, batch: dict[str, Tensor], device: str) -> int:
    """The most memory a step needs: parameters, gradients, optimizer and score state, and what autograd saves.

    On a CPU every storage counts once and temporaries within one operation are not seen; with gradient checkpointing
    neither is what is recomputed. On a GPU it is `max_memory_allocated`, less what other variants hold.
    """
    variant.model(**batch).loss.backward()  # gradients exist, as they do when the next forward ends at its peak
    if device == "cuda":
        held = storage_bytes(_static(variant))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        variant.model(**batch).loss.backward()
        peak = held + torch.cuda.max_memory_allocated() - before
    else:
        storages = _storages(_static(variant))

        def count(tensor: Tensor) -> Tensor:
            storages.update(_storages([tensor]))
            return tensor.detach()  # an output saved as it is would hold its own graph for ever

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = variant.model(**batch).loss
        peak = sum(storages.values())
        del loss
    variant.optimizer.zero_grad()
    return peak


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind these tensors."""
    return sum(_storages(tensors).values())


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of the storages behind these tensors."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _static(variant: Variant) -> Iterable[Tensor]:
    """What lives from step to step."""
    model: nn.Module = variant.model
    yield from model.parameters()
    yield from model.buffers()
    yield from (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    states: list[dict[str, Any]] = list(variant.optimizer.state.values())
    yield from (value for state in states for value in state.values() if isinstance(value, Tensor))
    yield from variant.state()

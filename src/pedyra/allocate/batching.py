"""Which layers can be computed together. On a GPU it is the number of operations that costs, not their size."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor

PIECE = 1 << 18
"""Elements that a CPU works on at a time: few enough to stay in its cache."""


def alike(keys: Iterable[Hashable]) -> list[list[int]]:
    """Indices of equal keys, group by group in the order of their first."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def in_pieces(indices: Sequence[int], elements: int, device: torch.device) -> list[Sequence[int]]:
    """Matrices of so many elements each, in runs that a CPU keeps in its cache; on another device all at once."""
    count = max(1, PIECE // max(1, elements)) if device.type == "cpu" else max(1, len(indices))
    return [indices[at : at + count] for at in range(0, len(indices), count)]


def per_matrix(function: Callable[[Tensor], tuple[Tensor, ...]], matrices: Sequence[Tensor]) -> list[list[Tensor]]:
    """`function` of every matrix, those of one shape in one call: per result the list of all matrices' parts.

    Parts are contiguous, whatever the function returns: as a checkpoint holds them, so that a resumed run multiplies
    in the same order.
    """
    parts: dict[int, list[Tensor]] = {}
    for group in alike(tuple(matrix.shape) for matrix in matrices):
        results = function(torch.stack([matrices[i] for i in group]))
        for position, index in enumerate(group):
            parts[index] = [result[position].contiguous() for result in results]
    return [list(column) for column in zip(*(parts[i] for i in range(len(matrices))), strict=True)]

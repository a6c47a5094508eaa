"""How a new triple begins: contributing nothing, along a random direction.

The paper says "initialized for critical directions" and not how.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.resize import NewTriples


def gaussian_triples(layer: AdaptedLayer, num: int, *, start: str, generator: Generator) -> NewTriples:
    """Random triples that change nothing yet: B = 0 after a "lora" start, E = 0 after an "svd" start (AdaLoRA's)."""
    width, out = layer.a.in_features, layer.b.out_features
    # 1 / (3 in): the variance of PEFT's Kaiming-uniform start; 0.02: AdaLoRA's initial std.
    std = (3 * width) ** -0.5 if start == "lora" else 0.02
    rows = gaussian_rows(num, width, std=std, generator=generator)
    if start == "lora":
        return NewTriples(rows, torch.ones(num), torch.zeros(out, num))
    return NewTriples(rows, torch.zeros(num), gaussian_rows(num, out, std=std, generator=generator).T)


def gaussian_rows(num: int, width: int, *, std: float, generator: Generator) -> Float[Tensor, "num width"]:
    """Rows drawn from N(0, std^2), float32, on the CPU: the same numbers whatever the model's device."""
    return torch.randn(num, width, generator=generator) * std


def orthogonal_rows(
    rows: Float[Tensor, "r width"], num: int, *, norm: float, generator: Generator
) -> Float[Tensor, "num width"]:
    """Random rows of length `norm`, orthogonal to the span of `rows` and to each other where the width allows it."""
    fresh = torch.randn(num, rows.shape[1], generator=generator)
    stacked = torch.cat([rows.float().cpu(), fresh])
    # QR of (old | new) columns: its later columns are the new directions, freed of all earlier ones.
    q = torch.linalg.qr(stacked.T).Q  # (width, min(width, r + num))
    free = min(q.shape[1] - len(rows), num)
    if free < num:  # more rows than dimensions: what cannot be orthogonal stays random
        remainder = fresh[max(free, 0) :]
        remainder = remainder / remainder.norm(dim=1, keepdim=True)
        directions = torch.cat([q[:, len(rows) :].T[: max(free, 0)], remainder])
    else:
        directions = q[:, len(rows) :].T
    return directions * norm

"""How a new triple begins: contributing nothing, along a direction that was measured, or a random one."""

from __future__ import annotations

import torch
from torch import Tensor

from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.resize import NewTriples
from pedyra.methods.pedyra.directions import gaussian_rows, orthogonal_rows


def gaussian_triples(layer: AdaptedLayer, num: int, *, start: str, generator: torch.Generator) -> NewTriples:
    """Random triples that change nothing yet: B = 0 after a "lora" start, E = 0 after an "svd" start (AdaLoRA's)."""
    width, out, std = layer.a.in_features, layer.b.out_features, _std(layer, start)
    rows = gaussian_rows(num, width, std=std, generator=generator)
    if start == "lora":
        return NewTriples(rows, torch.ones(num), torch.zeros(out, num))
    return NewTriples(rows, torch.zeros(num), gaussian_rows(num, out, std=std, generator=generator).T)


def triples_along(
    directions: tuple[Tensor, Tensor],
    layer: AdaptedLayer,
    pruned: tuple[int, ...],
    num: int,
    *,
    start: str,
    generator: torch.Generator,
) -> NewTriples:
    """Triples along a layer's best directions that change nothing yet, as long as the rows that stay.

    Args:
        directions: u `(q, out)` and v `(q, in)`, best first; the loss falls along -u v^T.
        pruned: the layer's triples that go.
    """
    kept = [i for i in range(layer.rank) if i not in set(pruned)]
    A, B, std = _finite(layer.a.A.detach()[kept]), _finite(layer.b.weight.detach()[:, kept].T), _std(layer, start)
    rows = _along(directions[1], A, num, std, generator)
    if start == "lora":
        return NewTriples(rows, torch.ones(num), torch.zeros(B.shape[1], num))
    return NewTriples(rows, torch.zeros(num), -_along(directions[0], B, num, std, generator).T)


def _finite(rows: Tensor) -> Tensor:
    """Those that are numbers: what has diverged says nothing of how long a row should be."""
    return rows[rows.isfinite().all(1)]


def _std(layer: AdaptedLayer, start: str) -> float:
    # 1 / (3 in): the variance of PEFT's Kaiming-uniform start; 0.02: AdaLoRA's initial std.
    return (3 * layer.a.in_features) ** -0.5 if start == "lora" else 0.02


def _along(directions: Tensor, kept: Tensor, num: int, std: float, generator: torch.Generator) -> Tensor:
    """The first `num` directions, as long as the kept rows; where there are fewer, rows orthogonal to all as well."""
    rows = directions[:num] * _norm(kept, std)
    if len(rows) == num:
        return rows
    more = orthogonal_rows(
        torch.cat([kept.to(rows), rows]), num - len(rows), norm=float(_norm(kept, std)), generator=generator
    )
    return torch.cat([rows, more.to(rows)])


def _norm(kept: Tensor, std: float) -> Tensor:
    """The mean length of a layer's rows, or that of a fresh one where there are none."""
    return (
        kept.float().norm(dim=1).mean() if len(kept) else torch.tensor(std * kept.shape[1] ** 0.5, device=kept.device)
    )

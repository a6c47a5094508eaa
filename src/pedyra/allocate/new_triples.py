"""How a new triple of PE-DyRA begins: contributing nothing, along a direction that was measured, or a random one."""

from __future__ import annotations

import torch
from torch import Tensor

from pedyra.config import RankConfig
from pedyra.lora.attach import AdaptedLayer
from pedyra.lora.resize import NewTriples
from pedyra.methods.pedyra.directions import gaussian_rows, orthogonal_rows


def new_triples(
    layer: AdaptedLayer,
    pruned: tuple[int, ...],
    num: int,
    config: RankConfig,
    generator: torch.Generator,
    directions: tuple[Tensor, Tensor] | None = None,
) -> NewTriples:
    """New triples that change nothing yet: B = 0 after a LoRA start, E = 0 after an SVD start.

    `directions` are the layer's candidates (u (q, out), v (q, in)), best first; the loss falls along -u v^T.
    """
    gone = set(pruned)
    kept = [i for i in range(layer.rank) if i not in gone]
    A, B = layer.a.A.detach()[kept], layer.b.weight.detach()[:, kept].T
    lora = config.start == "lora"
    # 1 / (3 in): the variance of PEFT's Kaiming-uniform start; 0.02: AdaLoRA's initial std.
    std = (3 * A.shape[1]) ** -0.5 if lora else 0.02
    if directions is None:
        rows_A = gaussian_rows(num, A.shape[1], std=std, generator=generator)
    else:
        rows_A = _along(directions[1], A, num, std, generator)
    if lora:
        return NewTriples(rows_A, torch.ones(num), torch.zeros(B.shape[1], num))
    if directions is None:
        rows_B = gaussian_rows(num, B.shape[1], std=std, generator=generator)
    else:
        rows_B = -_along(directions[0], B, num, std, generator)
    return NewTriples(rows_A, torch.zeros(num), rows_B.T)


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

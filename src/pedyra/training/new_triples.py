"""How a new triple of PE-DyRA begins: contributing nothing, along a direction that `RankConfig.init` chooses."""

from __future__ import annotations

import torch
from torch import Tensor

from pedyra.adapters.attach import AdaptedLayer
from pedyra.adapters.resize import NewTriples
from pedyra.config import RankConfig
from pedyra.core.directions import gaussian_rows, orthogonal_rows


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
        rows_A = _rows(A, num, std, config.init, generator)
    else:
        rows_A = directions[1][:num] * _norm(A, std)
    if lora:
        return NewTriples(rows_A, torch.ones(num), torch.zeros(B.shape[1], num))
    if directions is None:
        rows_B = _rows(B, num, std, config.init, generator)
    else:
        rows_B = -directions[0][:num] * _norm(B, std)
    return NewTriples(rows_A, torch.zeros(num), rows_B.T)


def _norm(kept: Tensor, std: float) -> float:
    """The mean length of a layer's rows, or that of a fresh one where there are none."""
    return float(kept.float().norm(dim=1).mean()) if len(kept) else std * kept.shape[1] ** 0.5


def _rows(kept: Tensor, num: int, std: float, init: str, generator: torch.Generator) -> Tensor:
    width = kept.shape[1]
    if init == "gaussian":
        return gaussian_rows(num, width, std=std, generator=generator)
    return orthogonal_rows(kept, num, norm=_norm(kept, std), generator=generator)

"""Directions for new triples. The paper says "initialized for critical directions" and not how (design readings)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor


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


def singular_turn(A: Float[Tensor, "*l r in"], B: Float[Tensor, "*l out r"]) -> Float[Tensor, "*l r r"]:
    """W such that W A and B W^-1 are the SVD of B A, the strongest first, with rows of A of the old ones' mean length.

    A direction of no use then still has a row of A to learn with, and a column of B of no length, as at LoRA's start.
    B A is not formed. For r <= in, out; not finite where rows of A depend on each other, or A or B is not. Layers of
    one shape can be turned together.
    """
    left, right = torch.linalg.qr(B).R, torch.linalg.qr(A.mT).R  # A = right^T Q^T
    core = left @ right.mT
    finite = core.isfinite().all(-1).all(-1)[..., None, None]  # decided on the device; torch's SVD would raise
    Vh = torch.where(finite, torch.linalg.svd(torch.where(finite, core, 0.0)).Vh, torch.nan)
    length = A.norm(dim=-1).mean(-1)[..., None, None]
    return length * torch.linalg.solve_triangular(right.mT, Vh, upper=False, left=False)


def triple_lengths(
    A: Float[Tensor, "*l r in"], E: Float[Tensor, "*l r"], B: Float[Tensor, "*l out r"]
) -> Float[Tensor, "*l r"]:
    """||e_i B_i A_i||_F: how large each triple's part of the update is."""
    return E.abs() * A.norm(dim=-1) * B.square().sum(-2).sqrt()  # a norm along columns takes a CPU four times as long

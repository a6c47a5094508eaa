"""Singular values of a layer's update, and how many of them count."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def singular_values(A: Float[Tensor, "r in"], E: Float[Tensor, " r"], B: Float[Tensor, "out r"]) -> Float[Tensor, " n"]:
    """Find those of B diag(E) A, n = min(in, out, r), by QR of both factors, and never from the dense product.

    NaN where a factor is not finite.
    """
    if len(E) == 0:
        return E.float()
    if E.device.type == "mps":  # which has no singular values
        A, E, B = A.cpu(), E.cpu(), B.cpu()
    upper_A = torch.linalg.qr(A.float().mT, mode="r").R  # (min(in, r), r)
    upper_B = torch.linalg.qr(B.float(), mode="r").R  # (min(out, r), r)
    product = (upper_B * E.float()) @ upper_A.mT
    if not product.isfinite().all():  # svdvals would raise, and end a run that only has to be reported
        return product.new_full((min(product.shape),), torch.nan)
    return torch.linalg.svdvals(product)


def effective_rank(values: Float[Tensor, " n"]) -> float:
    """Take exp of the entropy of the normalised singular values (Roy and Vetterli, 2007); 0 for a zero matrix,
    and NaN where the values are.

    The paper plots an "effective rank" (Fig. 1a) without defining it; this is the field's usual definition.
    """
    total = values.sum()
    if total.isnan():
        return math.nan
    if not total > 0:
        return 0.0
    shares = values / total
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))

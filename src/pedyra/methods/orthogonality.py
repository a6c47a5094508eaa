"""The orthogonality term, Eq. (2): its value and, in closed form, its gradient.

Applied as a gradient beside the task's (no autograd, any loss function), at the cost of two r x r products per layer.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def orthogonality(rows: Float[Tensor, "*batch r n"], *, form: str) -> Float[Tensor, "*batch"]:
    """||M M^T - I||_F of factors whose r triples are rows, or its square.

    "squared" is Eq. (2) as written; "norm" is the un-squared one of AdaLoRA's code, for which 0.1 and 0.3 were tuned.
    """
    norm = torch.linalg.matrix_norm(_residual(rows))
    return norm.square() if form == "squared" else norm


def orthogonality_gradient(rows: Float[Tensor, "*batch r n"], *, form: str) -> Float[Tensor, "*batch r n"]:
    """d `orthogonality` / d rows: 4 (M M^T - I) M when squared, 2 (M M^T - I) M / ||M M^T - I||_F otherwise.

    Zero where the rows are exactly orthonormal, the minimum, at which the norm has no derivative.
    """
    residual = _residual(rows)
    gradient = residual @ rows.float()
    if form == "squared":
        return 4 * gradient
    norm = torch.linalg.matrix_norm(residual)[..., None, None]
    return 2 * gradient / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def _residual(rows: Float[Tensor, "*batch r n"]) -> Float[Tensor, "*batch r r"]:
    rows = rows.float()
    return rows @ rows.mT - torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)

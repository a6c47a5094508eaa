"""The singular values of a LoRA's update, from its factors, say how large each direction is, whatever the rows say.

Of all updates of rank k, the first k singular directions are nearest to B A (Eckart and Young, 1936). They say nothing
about the loss, which is what a fit measures, and need no row for it. The dense matrix is never made: with
B = Qb Rb and A^T = Qa Ra, B A = Qb (Rb Ra^T) Qa^T, and only the r x r matrix in the middle is decomposed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Singular(NamedTuple):
    """B A of one layer by its singular directions, the largest first: B A = U diag(values) V."""

    U: Float[Tensor, "out r"]
    values: Float[Tensor, " r"]
    V: Float[Tensor, "r in"]

    def factors(self, rank: int) -> tuple[Float[Tensor, "k in"], Float[Tensor, "out k"]]:
        """Return A and B of the first `rank` directions, each with the root of every value, so that half precision
        holds both."""
        root = self.values[:rank].sqrt()
        return root[:, None] * self.V[:rank], self.U[:, :rank] * root

    def rank_of_energy(self, part: float) -> int:
        """Count the fewest directions that have this part of the sum of squares, and one at least."""
        energy = self.values.square().cumsum(0)
        return min(int((energy < part * energy[-1]).sum()) + 1, len(self.values))

    def kept(self, rank: int) -> float:
        """Return the part of the sum of squares that the first `rank` directions have; of an update of zeros, all."""
        energy = self.values.square()
        whole = float(energy.sum())
        return float(energy[:rank].sum()) / whole if whole else 1.0


def singular(A: Float[Tensor, "r in"], B: Float[Tensor, "out r"], dtype: torch.dtype = torch.float64) -> Singular:
    """Decompose B A in this precision. It takes milliseconds for a rank well below both sides."""
    Qa, Ra = torch.linalg.qr(A.to(dtype).T)
    Qb, Rb = torch.linalg.qr(B.to(dtype))
    U, values, V = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    return Singular(Qb @ U, values, V @ Qa.T)


def singular_values(A: Float[Tensor, "r in"], B: Float[Tensor, "out r"]) -> Float[Tensor, " n"]:
    """Find those of B A, n = min(in, out, r), by QR of both factors; NaN where a factor is not finite."""
    if len(A) == 0:
        return A.new_zeros(0)
    if A.device.type == "mps":  # which has no singular values
        A, B = A.cpu(), B.cpu()
    upper_A = torch.linalg.qr(A.float().mT, mode="r").R  # (min(in, r), r)
    upper_B = torch.linalg.qr(B.float(), mode="r").R  # (min(out, r), r)
    product = upper_B @ upper_A.mT
    if not product.isfinite().all():  # svdvals would raise, and end a run that only has to be reported
        return product.new_full((min(product.shape),), torch.nan)
    return torch.linalg.svdvals(product)


def effective_rank(values: Float[Tensor, " n"]) -> float:
    """Take exp of the entropy of the normalised singular values (Roy and Vetterli, 2007); 0 for a zero matrix,
    and NaN where the values are.

    The paper plots an "effective rank" (Fig. 1a) without defining it; this is the field's usual definition.
    """
    total = values.sum()
    return 0.0 if total == 0 else float(torch.special.entr(values / total).sum().exp())

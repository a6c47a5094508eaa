"""The singular values of a LoRA's update, from its factors: how large each direction is, whatever the rows say.

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
        """A and B of the first `rank` directions; both have the root of each value, which half precision holds."""
        root = self.values[:rank].sqrt()
        return root[:, None] * self.V[:rank], self.U[:, :rank] * root

    def rank_of_energy(self, part: float) -> int:
        """The fewest directions that have this part of the sum of squares, and one at least."""
        energy = self.values.square().cumsum(0)
        return min(int((energy < part * energy[-1]).sum()) + 1, len(self.values))

    def kept(self, rank: int) -> float:
        """The part of the sum of squares that the first `rank` directions have; of an update of zeros, all."""
        energy = self.values.square()
        whole = float(energy.sum())
        return float(energy[:rank].sum()) / whole if whole else 1.0


def singular(A: Float[Tensor, "r in"], B: Float[Tensor, "out r"]) -> Singular:
    """In double precision, as for a rank well below both sides, where it takes milliseconds."""
    Qb, Rb = torch.linalg.qr(B.double())
    Qa, Ra = torch.linalg.qr(A.double().T)
    U, values, V = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    return Singular(Qb @ U, values, V @ Qa.T)

"""The paper as pure functions: Eqs. (4) to (8), Algorithms 1 and 2. Eqs. (2) and (3), which other methods have too, are
in `pedyra.allocate` (`orthogonality`, `scores`).

Notation: one layer's triples are `A (r, in)`, `E (r,)` and `B (out, r)`; triple i is row i of A, entry i of E and
column i of B. The paper's A is the input-side factor, for only then is Eq. (6) well typed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from pedyra.allocate.allocation import RankPlan, Scores, layer_means, lowest, make_plan, prunable, round_robin


def gradient_weights(norms: Float[Tensor, "*layers 3"]) -> Float[Tensor, "*layers 3"]:
    """omega of Eq. (5) from the Frobenius norms of the gradients of A, E and B; equal weights where all are zero."""
    total = norms.sum(-1, keepdim=True)
    return torch.where(total > 0, norms / total.clamp_min(torch.finfo(norms.dtype).tiny), norms.new_tensor(1 / 3))


def gradient_scores(
    importance_A: Float[Tensor, "r in"],
    importance_E: Float[Tensor, " r"],
    importance_B: Float[Tensor, "out r"],
    omega: Float[Tensor, " 3"],
) -> Float[Tensor, " r"]:
    """Gradient-aware triple importance, Eq. (4); `omega` weighs (A, E, B), as in Eq. (5).

    S(A_i) and S(B_i) are means over the long dimension, as in AdaLoRA; the paper does not say. A sum would multiply
    them by the width and undo the weighting.
    """
    return omega[0] * importance_A.mean(1) + omega[1] * importance_E + omega[2] * importance_B.mean(0)


def input_scores(
    A: Float[Tensor, "*l r in"],
    E: Float[Tensor, "*l r"],
    B: Float[Tensor, "*l out r"],
    input_norm: Float[Tensor, "*l in"],
) -> Float[Tensor, "*l r"]:
    """Input-based triple importance, Eq. (6): |e_i| * sum_k |A_ik| ||X_k|| * ||B_i||_2."""
    reach = (A.abs() @ input_norm[..., None])[..., 0]  # (*l, r)
    return E.abs() * reach * B.norm(dim=-2)


def mix_scores(
    gradient: Float[Tensor, " n"], inputs: Float[Tensor, " n"], *, alpha: float, norm: str
) -> Float[Tensor, " n"]:
    """Algorithm 1, step 3, over ALL triples of the model: alpha * S_grad + (1 - alpha) * S_inp.

    `norm` makes the two comparable first; the literal sum ("none") is degenerate, for S_inp is 1e8 to 1e12 times
    S_grad: "mean" divides each by its mean over all triples.
    """
    if norm == "mean":
        gradient, inputs = _over_mean(gradient), _over_mean(inputs)
    return alpha * gradient + (1 - alpha) * inputs


def _over_mean(scores: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    mean = scores.mean()
    return torch.where(mean > 0, scores / mean.clamp_min(torch.finfo(scores.dtype).tiny), torch.zeros_like(scores))


def plan_adjustment(
    scores: Scores,
    *,
    moves: int,
    min_rank: int,
    max_ranks: Mapping[str, int],
    parameters: Mapping[str, int] | None = None,
    spare: int = 0,
) -> RankPlan:
    """Algorithm 2: prune the `moves` lowest triples, give one to each best layer. The sum of the ranks is conserved;
    with `parameters`, the number of parameters is.

    A layer's best `min_rank` triples are never pruned; when fewer than `moves` can go, fewer move. When `moves`
    exceeds the number of layers, the ranking is walked again (round-robin), so that the sum is conserved exactly.

    Args:
        parameters: those of one triple of a layer. Triples and layers are then ranked by their score per parameter.
            What the pruned ones free, with the spare, goes to new triples of the `moves` best layers in turn, as long
            as one fits. What is left over is carried to the next adjustment.
        spare: parameters left unused by earlier adjustments.
    """
    units = dict.fromkeys(scores, 1) if parameters is None else parameters
    per_unit = {name: [value / units[name] for value in values] for name, values in scores.items()}
    pruned = lowest(prunable(per_unit, min_rank), moves)
    layer_scores = layer_means(scores)
    ranks = {name: len(values) - len(pruned.get(name, ())) for name, values in scores.items()}
    ranking = sorted(ranks, key=lambda name: -layer_scores[name] / units[name])  # stable: ties in layer order
    if parameters is not None:
        ranking = ranking[: max(moves, 1)]
    freed = spare + sum(units[name] * len(indices) for name, indices in pruned.items())
    added = round_robin(ranking, ranks, max_ranks, units, freed) if moves else {}
    return make_plan(scores, pruned, added, layer_scores)


def two_thirds_log_variance(layer_scores: Mapping[str, float], ranks: Mapping[str, int]) -> float | None:
    """Fig. 5: the logarithm of the variance of G_l^(2/3) / r_l over the layers; lower is nearer to Eq. (8).

    Layers of rank 0 are left out. None where it is undefined: fewer than two layers, or no variance at all.
    """
    ratios = [score ** (2 / 3) / ranks[name] for name, score in layer_scores.items() if ranks[name] > 0]
    if len(ratios) < 2:
        return None
    mean = sum(ratios) / len(ratios)
    variance = sum((ratio - mean) ** 2 for ratio in ratios) / (len(ratios) - 1)
    return math.log(variance) if variance > 0 else None

"""How much a triple matters: Eqs. (3) to (6) and Algorithm 1 of the paper.

Notation: one layer's triples are `A (r, in)`, `E (r,)` and `B (out, r)`; triple i is row i of A, entry i of E and
column i of B. The paper's A is the input-side factor, for only then is Eq. (6) well typed.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def update_sensitivity_(
    sensitivity: Float[Tensor, " n"],
    uncertainty: Float[Tensor, " n"],
    product: Float[Tensor, " n"],
    *,
    beta1: float,
    beta2: float,
    finite: Bool[Tensor, ""] | None = None,
) -> Bool[Tensor, ""]:
    """Eq. (3), in place: the two moving averages of one optimizer step, `product` being |w * grad|, element-wise.

    The uncertainty uses the sensitivity of this step, already updated, as Eq. (3) writes it. A step with any
    non-finite product leaves both averages as they were (overflow of fp16, a NaN loss); that is decided on the
    device, without a synchronisation. Returns whether the step was finite, as a tensor; `product` is used up, so that
    no temporary of its size is made.

    Args:
        finite: whether the step is, where these are only some of its elements.
    """
    if finite is None:
        finite = product.sum().isfinite()  # of values that are not negative: any that is not finite shows in the sum
    torch.where(finite, product, sensitivity, out=product)
    sensitivity.lerp_(product, 1 - beta1)
    product.sub_(sensitivity).abs_()
    torch.where(finite, product, uncertainty, out=product)
    uncertainty.lerp_(product, 1 - beta2)
    return finite


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


def triple_lengths(
    A: Float[Tensor, "*l r in"], E: Float[Tensor, "*l r"], B: Float[Tensor, "*l out r"]
) -> Float[Tensor, "*l r"]:
    """||e_i B_i A_i||_F: how large each triple's part of the update is."""
    return E.abs() * A.norm(dim=-1) * B.square().sum(-2).sqrt()  # a norm along columns takes a CPU four times as long


def removal_loss(weights: Float[Tensor, "r n"], second_moment: Float[Tensor, "r n"]) -> Float[Tensor, " r"]:
    """sum_j w_ij^2 v_ij / 2: the loss of setting a triple's weights to zero, to second order.

    Optimal brain damage (LeCun, Denker, Solla 1990) with Adam's second moment as the diagonal of the curvature, an
    empirical Fisher of batch gradients: right up to one factor for all triples, the number of samples in a batch.
    """
    return 0.5 * (weights.square() * second_moment).sum(1)


def mix_scores(
    gradient: Float[Tensor, " n"], inputs: Float[Tensor, " n"], *, alpha: float, norm: str
) -> Float[Tensor, " n"]:
    """Algorithm 1, step 3, over ALL triples of the model: alpha * S_grad + (1 - alpha) * S_inp.

    `norm` makes the two comparable first; the literal sum ("none") is degenerate, for S_inp is 1e8 to 1e12 times
    S_grad: "mean" divides each by its mean over all triples, "rank" takes percentiles (ties share the lowest).
    """
    if norm == "mean":
        gradient, inputs = _over_mean(gradient), _over_mean(inputs)
    elif norm == "rank":
        gradient, inputs = _percentile(gradient), _percentile(inputs)
    return alpha * gradient + (1 - alpha) * inputs


def _over_mean(scores: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    mean = scores.mean()
    return torch.where(mean > 0, scores / mean.clamp_min(torch.finfo(scores.dtype).tiny), torch.zeros_like(scores))


def _percentile(scores: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    below = torch.searchsorted(scores.sort().values, scores, right=False)
    return below.to(scores.dtype) / max(1, len(scores) - 1)

"""Whether two results agree, and in which of two senses; `test_closeness.py` keeps the tests to these two functions.

A product or a sum is rounded, and how depends on the order of its terms. Each CPU, thread number and library chooses
the order by its own rules, from the shapes and the operation, so two computations of one number may differ in their
last bits on a machine that nobody here has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether dtypes, shapes and values are equal, to the last bit (but 0.0 is -0.0).

    For what only one answer is right: values that were copied, moved or sliced; integers; one computation that ran
    twice, with the same operations on the same shapes in the same order (a resume, a repeat); and arithmetic that is
    exact in any order, such as adding 0 or a product of small integers. For everything else there is `close`.
    """
    return found.dtype == expected.dtype and torch.equal(found, expected)


def close(found: Tensor, expected: Tensor, *, terms: int = 256, scale: float | None = None) -> bool:
    """Whether the values are equal but for rounding: for one number that was computed in two ways.

    The tolerance is 8 * eps * sqrt(terms) * scale. Each of `terms` roundings is off by at most half an eps of the less
    exact dtype, in a direction of its own, so that their sum grows with the square root; 8 leaves room for those that
    agree in direction.

    Args:
        terms: how many products are added up, or operations follow one another, on the way to one value. The default
            is enough for a model of a few narrow layers.
        scale: the size of the largest term. None: the largest magnitude in `expected`; where terms cancel each other,
            the result is smaller than they were, and only the caller knows them.
    """
    if found.shape != expected.shape:
        return False
    eps = max(torch.finfo(found.dtype).eps, torch.finfo(expected.dtype).eps)
    if scale is None:
        scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    difference = (found.detach().double() - expected.detach().double()).abs()
    return bool((difference <= 8 * eps * math.sqrt(terms) * scale).all())  # False where one is not a number

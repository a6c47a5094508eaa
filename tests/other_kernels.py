"""Products and sums rounded as another CPU might round them: `PEDYRA_TEST_ROUNDING=1 python -m pytest tests/lora`.

A test that compares the bits of two computations passes where it was written and fails on somebody's CPU. Here each
product and sum of floats is off by up to so many eps of its terms, by numbers that are drawn from the operation, the
shapes and the strides. One computation that runs twice keeps its bits, and two computations of one number have
different ones. What is exact in any order, as sums of small integers and of zeros are, stays exact. With 1 every test
is to pass; with 30 the bits of a short computation differ too, and a tolerance may be too narrow.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

strength = 0.0
"""How many eps a result may be off."""


def perturbed(name: str, inputs: Sequence[Tensor], result: Tensor, other: Tensor, size: Tensor) -> Tensor:
    """`result` where it is the same as `other`, which is of more digits or of another order; elsewhere off by up to
    `strength` eps of `size`, the sum of the magnitudes of the terms."""
    key = repr([name, *((tuple(x.shape), x.stride(), x.dtype) for x in inputs)])
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")
    draw = torch.rand(result.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    # Half precision is added up in float32 and rounded once.
    eps = strength * torch.finfo(torch.promote_types(result.dtype, torch.float32)).eps
    off = (other + eps * draw * size).to(result.dtype)
    return torch.where((result.double() == other) | ~result.isfinite(), result, off)


def reordered(x: Tensor, dim: int) -> Tensor:
    order = list(range(x.shape[dim]))
    return x.index_select(dim, torch.tensor(order[1::2] + order[::2], dtype=torch.long))


def product(name: str, a: Tensor, b: Tensor, c: Tensor | None = None, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """alpha a b + beta c, of matrices or of batches of them."""
    a, b = a.detach(), b.detach()
    multiply = torch.mm if a.dim() == 2 else torch.bmm

    def times(a: Tensor, b: Tensor) -> Tensor:
        return multiply(a, b, out=a.new_empty(*a.shape[:-1], b.shape[-1]))  # this overload is torch's own still

    def added(ab: Tensor, c: Tensor | None) -> Tensor:
        ab = ab if alpha == 1 else ab * alpha
        return ab if c is None else ab + c

    c = None if c is None or beta == 0 else c.detach() * beta
    result = added(times(a, b), c)
    if not a.is_floating_point() or not result.numel():
        return result
    size = added(times(a.abs().double(), b.abs().double()) * (1 if alpha > 0 else -1), None if c is None else c.abs())
    if a.dtype == torch.float64:
        halves = range(0, a.shape[-1], max(1, a.shape[-1] // 2))
        other = torch.zeros_like(result) if c is None else c
        for i, step in ((i, max(1, a.shape[-1] // 2)) for i in halves):
            other = added(times(a[..., i : i + step], b[..., i : i + step, :]), other)
    else:
        other = added(times(a.double(), b.double()), None if c is None else c.double())
    return perturbed(name, (a, b), result, other, size)


def total(x: Tensor, dim: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    x, dims = x.detach(), list(dim if dim else range(x.dim()))
    own = x.dtype if x.is_floating_point() else torch.int64

    def added(x: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.sum(x, dim=dims, keepdim=keepdim, dtype=dtype, out=torch.empty(0, dtype=dtype))

    result = added(x, dtype or own)
    if not (x.is_floating_point() and result.is_floating_point() and x.dim()):
        return result
    mixed = x
    for d in dims:
        mixed = reordered(mixed, d % x.dim())
    return perturbed(f"sum{dims}", (x,), result, added(mixed, torch.float64), added(x.abs(), torch.float64))


def average(x: Tensor, dim: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    count = math.prod(x.shape[d] for d in (dim if dim else range(x.dim())))
    return total(x, dim, keepdim, dtype=dtype or x.dtype) / count


def norm(x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    x = x.detach()

    def of(x: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.linalg.vector_norm(x, ord, dim, keepdim, dtype=dtype, out=torch.empty(0, dtype=dtype))

    result, exact = of(x, dtype or x.dtype), of(x, torch.float64)
    return result if math.isinf(ord) else perturbed(f"norm{ord}{dim}", (x,), result, exact, exact)


KERNELS: dict[str, Callable[..., Tensor]] = {
    "mm": lambda a, b: product("mm", a, b),
    "bmm": lambda a, b: product("bmm", a, b),
    "addmm": lambda c, a, b, beta=1, alpha=1: product("addmm", a, b, c, beta, alpha),
    "baddbmm": lambda c, a, b, beta=1, alpha=1: product("baddbmm", a, b, c, beta, alpha),
    "mv": lambda a, b: product("mv", a, b[:, None])[:, 0],
    "addmv": lambda c, a, b, beta=1, alpha=1: product("addmv", a, b[:, None], c[:, None], beta, alpha)[:, 0],
    "dot": lambda a, b: product("dot", a[None], b[:, None])[0, 0],
    "sum": lambda x, dtype=None: total(x, None, dtype=dtype),
    "sum.dim_IntList": total,
    "mean": lambda x, dtype=None: average(x, None, dtype=dtype),
    "mean.dim": average,
    "linalg_vector_norm": norm,
}


@contextmanager
def other_kernels(eps: float = 1.0) -> Iterator[None]:
    """While it lasts, these kernels are the CPU's in this process, off by up to so many `eps`. Attention is computed by
    products of matrices."""
    global strength
    strength = eps
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what is overridden
        for name, kernel in KERNELS.items():
            library.impl(name, kernel, "CPU")
    flash = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(flash)
        library._destroy()

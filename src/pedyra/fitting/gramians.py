"""The basis of every layer and its slopes follow from sums over the tokens of all batches of a calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor

BLOCKS = 128
"""The slopes of so many batches, up to twice as many, are kept one by one. Beyond it neighbours are put together, so
that memory does not grow with them. Ranks above 32 keep fewer, in the same memory, but at least `FEWEST_BLOCKS`."""
FEWEST_BLOCKS = 16


class Sums(NamedTuple):
    """The sums of one layer over all batches, with h and g as in `pedyra.fitting.balance`."""

    P: Float[Tensor, "r r"]
    """Of h h^T over the tokens whose gradient is not zero: padding has none."""
    Q: Float[Tensor, "r r"]
    """Of g g^T over them, g of the loss of one sample."""
    K: Float[Tensor, "blocks r r"]
    """Of h g^T in each block, g of the mean loss over its samples."""
    tokens: float


@dataclass
class _Running:
    """The same sums of one layer as they grow, in float32, on its device."""

    P: Tensor
    Q: Tensor
    tokens: Tensor
    K: list[Tensor] = field(default_factory=list)
    batch: list[Tensor] = field(default_factory=list)
    """P, Q, K and tokens of the present batch, which add up call by call of the layer."""


class Gramians:
    """The sums of every layer: `observer` sees the tokens of a batch, `close` ends it. Nothing waits for the device.

    Memory is 2 r^2 a layer, and r^2 for every block: a batch, or a few batches together where there are many.

    Args:
        factors: layer -> its A `(r, in)`, on whose device its sums are.
    """

    def __init__(self, factors: Mapping[str, Tensor]) -> None:
        high = max(32, *map(len, factors.values()))
        self._most = 2 * max(FEWEST_BLOCKS, BLOCKS * 32**2 // high**2)
        self._layers: dict[str, _Running] = {}
        for name, A in factors.items():
            empty = torch.zeros(len(A), len(A), device=A.device)
            self._layers[name] = _Running(empty, empty.clone(), torch.zeros((), device=A.device))
        self._samples: list[Tensor] = []
        """Of each block; 0 where nothing in it counts."""
        self.batches = 0
        """Closed batches, also those that count for nothing."""
        self.active: set[str] = set()
        """The layers that were called with gradients."""

    def observer(self, name: str) -> Callable[[Tensor, Tensor], None]:
        """Return the function that takes h `(..., r)` of a call of this layer, and g `(..., r)` of the loss that is
        differentiated."""
        running = self._layers[name]

        def observe(h: Tensor, g: Tensor) -> None:
            h, g = h.detach().flatten(0, -2).float(), g.detach().flatten(0, -2).float()
            counts = (g != 0).any(-1, keepdim=True)
            h = h * counts
            result = [h.T @ h, g.T @ g, h.T @ g, counts.sum().float()]
            if running.batch:
                torch._foreach_add_(running.batch, result)
            else:
                running.batch = result

        return observe

    def close(self, samples: Tensor, loss_scale: float = 1.0) -> None:
        """End a batch, whose loss is a mean over `samples` `()` and was multiplied by `loss_scale`. It counts for
        nothing where it has no sample, or something in it is not finite."""
        if len(self._samples) >= self._most:
            self._halve()
        scale = torch.where(samples > 0, samples / loss_scale, 0.0)  # from the loss that is trained to a sum
        result = []
        for running in self._layers.values():
            zero = torch.zeros_like(running.P)
            P, Q, K, tokens = running.batch or (zero, zero, zero, torch.zeros_like(running.tokens))
            result.append((P, Q * scale.to(Q).square(), K * scale.to(K), tokens))
            running.batch = []
        counts = torch.stack([(each * 0).sum().to(samples.device) for parts in result for each in parts]).sum() == 0
        counts &= samples > 0
        for running, parts in zip(self._layers.values(), result, strict=True):
            P, Q, K, tokens = (torch.where(counts.to(each.device), each, 0.0) for each in parts)
            running.P += P
            running.Q += Q
            running.tokens += tokens
            running.K.append(K / samples.to(K).clamp_min(1e-3))
        self._samples.append(torch.where(counts, samples.float(), 0.0))
        self.batches += 1

    def _halve(self) -> None:
        """Two neighbouring blocks become one: the slopes of a mean over the samples of both."""
        first, second = torch.stack(self._samples).view(-1, 2).unbind(1)
        both = first + second
        for running in self._layers.values():
            weights = (torch.stack([first, second], 1) / both.clamp_min(1e-3)[:, None]).to(running.P.device)
            pairs = torch.stack(running.K).view(len(both), 2, *running.P.shape)
            running.K = list((pairs * weights[..., None, None]).sum(1).unbind())
        self._samples = list(both.unbind())

    def totals(self) -> tuple[dict[str, Sums], Float[Tensor, " blocks"]]:
        """Return the sums of all layers and the samples of each block that counts, on the CPU, of all processes, which
        saw other batches. Waits for the device."""
        samples = torch.stack(self._samples).cpu()
        own = {
            name: Sums(each.P.cpu(), each.Q.cpu(), torch.stack(each.K).cpu()[samples > 0], float(each.tokens))
            for name, each in self._layers.items()
        }
        every = gather_object([(own, samples[samples > 0].double())])
        sums = {}
        for name in own:
            P, Q, K, tokens = zip(*(each[name] for each, _ in every), strict=True)
            sums[name] = Sums(torch.stack(P).sum(0), torch.stack(Q).sum(0), torch.cat(K), sum(tokens))
        return sums, torch.cat([each for _, each in every])

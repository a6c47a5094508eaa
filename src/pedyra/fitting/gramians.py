"""Sums over the tokens of a window of steps, from which the worth of every direction of a LoRA follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pedyra.errors import UserError
from pedyra.fitting.repair import mixings
from pedyra.fitting.worth import Balance, balance, in_basis, removal_increases

BLOCKS = 128
"""Steps whose slopes are kept one by one at least; of a longer window neighbours are put together, so that memory does
not grow with it. Of ranks above 32 fewer are kept, in the same memory, but never below `FEWEST_BLOCKS`."""
FEWEST_BLOCKS = 16


@dataclass(frozen=True)
class Measured:
    """What a window of steps tells of one layer."""

    basis: Balance
    products: Float[Tensor, "steps r r"]
    """T K T^-1, of the loss of each step: the diagonal is the slope of every direction's gate, and the rest that of
    mixing one direction into another. A step may stand for a few of a long window."""
    tokens_per_sample: float
    parameters: int
    """Number of parameters of one direction: a row of A and a column of B."""

    @property
    def rank(self) -> int:
        return len(self.basis.values)

    @property
    def slopes(self) -> Float[Tensor, "steps r"]:
        """Of every direction's gate."""
        return self.products.diagonal(dim1=1, dim2=2)

    @property
    def increases(self) -> Float[Tensor, " r"]:
        """By how much the loss of a sample rises, about, without each direction alone."""
        return removal_increases(self.basis.values, self.tokens_per_sample)

    def reordered(self, worth: Float[Tensor, " r"]) -> Measured:
        """The same directions, the one of least worth last, whose `worth` per parameter says when they go among all."""
        order = worth.argsort(descending=True)
        values = (worth[order] * self.parameters).sqrt()
        basis = Balance(self.basis.T[order], self.basis.inverse[:, order], values)
        products = self.products[:, order][:, :, order]
        return replace(self, basis=basis, products=products, tokens_per_sample=2.0)


@dataclass(frozen=True)
class Calibration:
    """What a window of steps tells of all layers."""

    layers: dict[str, Measured]
    samples: Float[Tensor, " steps"]
    """Samples of each step."""
    skipped: int
    """Steps left out, where some gradient was not finite."""
    repairs: bool = True
    """Whether what is kept makes up for what is removed. Not where general text is not to be forgotten: it would do
    again what was removed."""

    def mixed(self, ranks: Mapping[str, int]) -> dict[str, Tensor]:
        """Layer -> I + M `(k, k)` of its first `ranks[name]` directions, which make up for what is removed."""
        if not self.repairs or all(ranks[name] == layer.rank for name, layer in self.layers.items()):
            return {name: torch.eye(ranks[name]).double() for name in self.layers}
        products = {name: layer.products for name, layer in self.layers.items()}
        found = mixings(products, self.samples, ranks)
        return {name: torch.eye(len(M)).double() + M for name, M in found.items()}


@dataclass
class _Sums:
    """Of one layer, float32, on its device. h and g are those of `pedyra.fitting.worth`."""

    P: Tensor
    """Sum of h h^T `(r, r)` over the tokens whose gradient is not zero: padding has none."""
    Q: Tensor
    """Sum of g g^T `(r, r)`, of the loss of one sample."""
    tokens: Tensor
    K: list[Tensor] = field(default_factory=list)
    """Per step the sum of h g^T `(r, r)`, of the step's loss."""
    running: list[Tensor] = field(default_factory=list)
    """P, Q, K and tokens of the step that is not complete, as its backward passes gave them."""


class Gramians:
    """Sums of every layer, step by step: `observer` sees tokens, `close` ends a step. Nothing waits for the device.

    Memory is 2 r^2 a layer, and r^2 for every block: a step, or a few steps together where there are many.

    Args:
        factors: layer -> its A `(r, in)`, on whose device its sums are.
        total: the sum over processes that see other samples of a step: `close` then exchanges 3 r^2 + 1 numbers a layer
            in one call, so that all of them hold the sums of all.
        blocks: that are kept at least. Default: `BLOCKS`, fewer of high ranks.
    """

    def __init__(
        self,
        factors: Mapping[str, Tensor],
        total: Callable[[Tensor], Tensor] | None = None,
        blocks: int | None = None,
    ) -> None:
        self._total = total
        self._layers: dict[str, _Sums] = {}
        *_, self._device = (A.device for A in factors.values())
        high = max(32, *map(len, factors.values()))
        self._most = 2 * (blocks or max(FEWEST_BLOCKS, BLOCKS * 32**2 // high**2))
        for name, A in factors.items():
            empty = torch.zeros(len(A), len(A), device=A.device)
            self._layers[name] = _Sums(empty, empty.clone(), torch.zeros((), device=A.device))
        self._samples: list[Tensor] = []
        """Of each block; 0 where nothing in it counts."""
        self._skipped = torch.zeros(())

    def observer(self, name: str) -> Callable[[Tensor, Tensor], None]:
        """What is given h `(..., r)` and g `(..., r)`, of the loss that is differentiated, of each call of a layer."""
        sums = self._layers[name]

        def observe(h: Tensor, g: Tensor) -> None:
            h, g = h.detach().flatten(0, -2).float(), g.detach().flatten(0, -2).float()
            counts = (g != 0).any(-1, keepdim=True)
            h = h * counts
            found = [h.T @ h, g.T @ g, h.T @ g, counts.sum().float()]
            if sums.running:
                torch._foreach_add_(sums.running, found)
            else:
                sums.running = found

        return observe

    def close(self, samples: Tensor | None, loss_scale: float | Tensor = 1.0) -> None:
        """A step is complete, of a loss that is a mean over `samples` `()` and was multiplied by `loss_scale`; over
        processes, each of which has its own, it is the mean over all of their samples. None: samples are tokens, the
        most that any layer saw.

        A step of no sample, or in which something is not finite, counts for nothing.
        """
        if len(self._samples) >= self._most:
            self._halve()
        if samples is None:
            none = torch.zeros((), device=self._device)
            samples = torch.stack([none, *(s.running[3].to(none) for s in self._layers.values() if s.running)]).max()
        scale = torch.where(samples > 0, samples / loss_scale, 0.0)  # from the loss that is trained to a sum
        found: list[Tensor] = [samples.float().to(self._device)]
        for sums in self._layers.values():
            zero = torch.zeros_like(sums.P)
            P, Q, K, tokens = sums.running or (zero, zero, zero, torch.zeros_like(sums.tokens))
            found += [P, Q * scale.to(Q).square(), K * scale.to(K), tokens]
            sums.running = []
        if self._total is not None:
            flat = self._total(torch.cat([each.reshape(-1).to(self._device) for each in found]))
            parts = flat.split([each.numel() for each in found])
            found = [part.view(each.shape) for part, each in zip(parts, found, strict=True)]
        samples, *rest = found
        whole = torch.stack([(each * 0).sum().to(self._device) for each in found]).sum() == 0  # all is finite
        whole &= samples > 0
        for index, sums in enumerate(self._layers.values()):
            P, Q, K, tokens = (torch.where(whole.to(each.device), each, 0.0) for each in rest[4 * index :][:4])
            sums.P += P
            sums.Q += Q
            sums.tokens += tokens
            sums.K.append(K / samples.to(K).clamp_min(1e-3))
        self._samples.append(torch.where(whole, samples, 0.0))
        self._skipped = self._skipped.to(whole.device) + ~whole

    def _halve(self) -> None:
        """Two neighbouring blocks become one: the slopes of a mean over the samples of both."""
        first, second = torch.stack(self._samples).view(-1, 2).unbind(1)
        both = first + second
        for sums in self._layers.values():
            weights = (torch.stack([first, second], 1) / both.clamp_min(1e-3)[:, None]).to(sums.P.device)
            pairs = torch.stack(sums.K).view(len(both), 2, *sums.P.shape)
            sums.K = list((pairs * weights[..., None, None]).sum(1).unbind())
        self._samples = list(both.unbind())

    def drop_step(self) -> None:
        """Forget the step that is not complete."""
        for sums in self._layers.values():
            sums.running = []

    @property
    def blocks(self) -> int:
        return len(self._samples)

    def unseen(self) -> list[str]:
        """Layers in which no token had a gradient in the steps that count. Waits for the device."""
        tokens = torch.stack([sums.tokens.to(self._device) for sums in self._layers.values()]).tolist()
        return [name for name, count in zip(self._layers, tokens, strict=True) if count == 0]

    def calibration(
        self, parameters: Mapping[str, int], joined: Callable[[list[Any]], list[Any]] = list
    ) -> Calibration:
        """What the window tells. Waits for the device.

        Args:
            parameters: layer -> number of parameters of one direction.
            joined: what joins the lists of processes that saw other steps of the same window, each its own as a process
                without `total` does; all of them are given the same.
        """
        own = {name: (each.P.cpu(), each.Q.cpu(), each.tokens.cpu()) for name, each in self._layers.items()}
        every = joined([own])
        bases, tokens = {}, {}
        for name in own:
            P, Q, count = (torch.stack(parts).sum(0) for parts in zip(*(each[name] for each in every), strict=True))
            tokens[name] = float(count)
            bases[name] = balance(P / max(tokens[name], 1e-3), Q / max(tokens[name], 1e-3))
        products = {name: self._products(name, basis) for name, basis in bases.items()}
        parts = joined([(torch.stack(self._samples).cpu().double(), products, int(self._skipped))])
        samples = torch.cat([part[0] for part in parts])
        kept, total = samples > 0, max(float(samples.sum()), 1.0)
        layers = {}
        for name, basis in bases.items():
            found = torch.cat([part[1][name] for part in parts])[kept]
            layers[name] = Measured(basis, found, tokens[name] / total, parameters[name])
        return Calibration(layers, samples[kept], sum(part[2] for part in parts))

    def mean_slopes(
        self, bases: Mapping[str, Balance], joined: Callable[[list[Any]], list[Any]] = list
    ) -> dict[str, Tensor]:
        """Layer -> the slope of the mean loss over all samples along the gate of each direction of these bases `(r,)`.
        Waits for the device.

        Args:
            joined: as in `calibration`.

        Raises:
            ValueError: no batch has a sample and a finite loss.
        """
        samples = torch.stack(self._samples).cpu().double()
        slopes = {name: self._products(name, basis).diagonal(dim1=1, dim2=2) for name, basis in bases.items()}
        sums = {name: (samples[:, None] * each).sum(0) for name, each in slopes.items()}
        parts = joined([(samples.sum(), sums)])
        total = torch.stack([count for count, _ in parts]).sum()
        if not total > 0:
            raise UserError("no batch has a finite loss, so no slope is known; give other rows, or train in bfloat16")
        return {name: torch.stack([part[name] for _, part in parts]).sum(0) / total for name in bases}

    def _products(self, name: str, basis: Balance) -> Float[Tensor, "steps r r"]:
        return in_basis(torch.stack(self._layers[name].K).cpu(), basis)

    def tensors(self) -> dict[str, Tensor]:
        """The state between two steps, for a checkpoint."""
        samples = torch.stack(self._samples) if self._samples else torch.zeros(0)
        found = {"samples": samples, "skipped": self._skipped.clone()}
        for name, sums in self._layers.items():
            K = torch.stack(sums.K) if sums.K else sums.P.new_zeros(0, *sums.P.shape)
            found |= {f"P.{name}": sums.P, f"Q.{name}": sums.Q, f"K.{name}": K, f"tokens.{name}": sums.tokens}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`. Raises ValueError: they are of other layers or ranks."""
        for name, sums in self._layers.items():
            if f"P.{name}" not in tensors or tensors[f"P.{name}"].shape != sums.P.shape:
                raise UserError(f"the Gramians of {name} are not in the checkpoint, or of another rank")
            sums.P, sums.Q, sums.tokens = (tensors[f"{key}.{name}"].to(sums.P) for key in ("P", "Q", "tokens"))
            sums.K = list(tensors[f"K.{name}"].to(sums.P).unbind())
        self._samples, self._skipped = list(tensors["samples"].to(self._device).unbind()), tensors["skipped"]

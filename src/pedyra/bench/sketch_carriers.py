"""Two carriers of a gradient sketch, compared: probe rows in the factor slots, and hooks on the layers.

Both give G P^T for fixed rows P, or Q^T G for fixed columns Q. Training uses the probes; the hooks live only here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from pedyra.bench.bench_variants import Variant
from pedyra.bench.memory import peak_bytes
from pedyra.lora.attach import AdaptedLayer

CARRIERS = ("probes", "hooks")
COLUMNS = {name: name for name in ("part", "size", "carrier", "ratio_to_plain", "extra_bytes")}
"""Columns of a row for people, with their titles."""


class HookCarrier:
    """Products with the gradient of each layer's weight, collected by hooks on the LoRA layers as they run."""

    def __init__(self, layers: Sequence[AdaptedLayer], fixed: Sequence[Tensor], part: str) -> None:
        """`fixed` are rows P `(q, in)` where `part` is "range", columns Q `(out, q)` where it is "co-range"."""
        self.sums: list[Tensor | None] = [None] * len(layers)
        self.kept: dict[int, Tensor] = {}
        """What the last forward kept for its backward pass, beside what autograd keeps."""
        self._fixed, self._part = fixed, part
        self._handles = [
            layer.module.register_forward_hook(lambda _, args, output, i=i: self._see(i, args[0], output))
            for i, layer in enumerate(layers)
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _see(self, index: int, x: Tensor, output: Tensor) -> None:
        x, fixed = x.detach().flatten(0, -2), self._fixed[index]
        if self._part == "range":
            self.kept[index] = x = x @ fixed.T  # (tokens, q): all that the backward pass needs of the input
            output.register_hook(lambda g: self._add(index, g.flatten(0, -2).T @ x))
        else:
            output.register_hook(lambda g: self._add(index, (g.flatten(0, -2) @ fixed).T @ x))

    def _add(self, index: int, product: Tensor) -> None:
        total = self.sums[index]
        self.sums[index] = product if total is None else total + product


def compare_carriers(
    model: Any, layers: Sequence[AdaptedLayer], batch: dict[str, Tensor], *, sizes: Sequence[int], rounds: int
) -> Iterator[dict[str, Any]]:
    """A row per part of the window, size and carrier: its forward and backward pass by one without, and its memory.

    All take turns in one process. `ratio_to_plain` is the median over `rounds` of processor times, `extra_bytes` the
    peak memory above that of the plain step (see `memory.peak_bytes`).
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for part in ("range", "co-range"):
        for size in sizes:
            make = {"plain": _no_carrier, "probes": _probes, "hooks": _hooks}
            seconds: dict[str, list[float]] = {name: [] for name in make}
            peaks: dict[str, int] = {}
            for _ in range(rounds + 1):  # the first is warm-up, and where memory is counted
                for name, start in make.items():
                    tensors, remove = start(layers, size, part)
                    began = time.process_time()
                    model(**batch).loss.backward()
                    seconds[name].append(time.process_time() - began)
                    if name not in peaks:
                        variant = Variant(name, model, optimizer, state=tensors)
                        peaks[name] = peak_bytes(variant, batch, "cpu")
                    remove()
                    model.zero_grad()
            for name in CARRIERS:
                pairs = zip(seconds[name][1:], seconds["plain"][1:], strict=True)
                yield {
                    "kind": "carrier",
                    "part": part,
                    "size": size,
                    "carrier": name,
                    "ratio_to_plain": median(own / plain for own, plain in pairs),
                    "plain_seconds": median(seconds["plain"][1:]),
                    "extra_bytes": peaks[name] - peaks["plain"],
                }


_Started = tuple[Callable[[], list[Tensor]], Callable[[], None]]
"""What the carrier keeps from step to step, and what takes it off."""


def _no_carrier(layers: Sequence[AdaptedLayer], size: int, part: str) -> _Started:
    return list, lambda: None


def _probes(layers: Sequence[AdaptedLayer], size: int, part: str) -> _Started:
    for layer, fixed in zip(layers, _fixed(layers, size, part), strict=True):
        if part == "range":
            layer.a.probe, layer.b.probe = fixed, torch.zeros(layer.b.out_features, size, requires_grad=True)
        else:
            layer.a.probe, layer.b.probe = torch.zeros(size, layer.a.in_features, requires_grad=True), fixed

    def tensors() -> list[Tensor]:
        probes = [probe for layer in layers for probe in (layer.a.probe, layer.b.probe) if probe is not None]
        return probes + [probe.grad for probe in probes if probe.grad is not None]

    def remove() -> None:
        for layer in layers:
            layer.a.probe = layer.b.probe = None

    return tensors, remove


def _hooks(layers: Sequence[AdaptedLayer], size: int, part: str) -> _Started:
    fixed = _fixed(layers, size, part)
    carrier = HookCarrier(layers, fixed, part)

    def tensors() -> list[Tensor]:
        return [*fixed, *(total for total in carrier.sums if total is not None), *carrier.kept.values()]

    return tensors, carrier.remove


def _fixed(layers: Sequence[AdaptedLayer], size: int, part: str) -> list[Tensor]:
    if part == "range":
        return [torch.randn(size, layer.a.in_features) for layer in layers]
    return [torch.linalg.qr(torch.randn(layer.b.out_features, size)).Q for layer in layers]

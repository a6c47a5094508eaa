"""Where the loss wants to go, layer by layer: top singular directions of the gradient, without ever forming it.

For a layer with input x `(N, in)` and output gradient g `(N, out)` the gradient of the full weight is G = g^T x. Probe
rows and columns in the two factor slots, of which one side is zero, add nothing to the output, and autograd writes
products with G into the other side's gradient: a fixed A-probe P `(q, in)` gives G P^T, a fixed B-probe Q `(out, q)`
gives Q^T G. Both are linear in G, so they add up over micro-batches, steps and data-parallel ranks, need no base
weight (4-bit bases work) and are exact under gradient checkpointing.

The window before an adjustment is cut in three, so that no step judges a direction that it chose:

1. range: P random; Y = G P^T spans the leading left directions (randomised SVD, Halko, Martinsson, Tropp 2011),
2. co-range: Q = orth(Y); X = Q^T G, whose SVD gives the candidate pairs (u, v),
3. gain: P = v; sigma = u^T G v of each step, with a mean and a standard error. A direction that was noise in the
   first two parts has a mean of zero here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pedyra.adapters.attach import AdaptedLayer

_STATE = ("sums", "left", "right", "gain_sum", "gain_square_sum")


class GradientSketch:
    """The sketch of all layers over one window of `steps` optimizer steps; `q` candidate directions per layer."""

    def __init__(self, layers: Sequence[AdaptedLayer], *, q: int, steps: int, generator: torch.Generator) -> None:
        self.layers = layers
        self.q = [min(q, layer.a.in_features, layer.b.out_features) for layer in layers]
        self.parts = (max(1, steps // 3), max(1, steps // 3), max(1, steps - 2 * (steps // 3)))
        self.done = 0
        """Optimizer steps observed so far."""
        self.left: list[Tensor] = []
        self.right: list[Tensor] = []
        self.gain_sum: list[Tensor] = []
        self.gain_square_sum: list[Tensor] = []
        omega = [
            torch.randn(n, layer.a.in_features, generator=generator) for n, layer in zip(self.q, layers, strict=True)
        ]
        self.sums = self._probe_rows([rows.to(layer.a.A.device) for rows, layer in zip(omega, layers, strict=True)])

    @torch.no_grad()
    def observe(self) -> None:
        """Read the probes' gradients after one step's backward passes, and go on to the next part when it is time."""
        first, second, _ = self.parts
        gradients = [self._take_gradient(layer) for layer in self.layers]
        if self.done < first + second:
            for total, gradient in zip(self.sums, gradients, strict=True):
                total += gradient
        else:
            for index, gradient in enumerate(gradients):  # gradient: G v^T, (out, q)
                gain = (self.left[index] * gradient).sum(0)
                self.gain_sum[index] += gain
                self.gain_square_sum[index] += gain.square()
        self.done += 1
        if self.done == first:
            self.left = [torch.linalg.qr(total).Q for total in self.sums]  # (out, q)
            self.sums = self._probe_columns(self.left)
        elif self.done == first + second:
            self._choose()

    def gains(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer the mean of sigma over the steps of the third part and its standard error, each `(q,)`."""
        n = self.done - self.parts[0] - self.parts[1]
        result = []
        for total, squares in zip(self.gain_sum, self.gain_square_sum, strict=True):
            mean = total / n
            variance = (squares / n - mean.square()).clamp_min(0) * n / max(1, n - 1)
            result.append((mean, (variance / n).sqrt()))
        return result

    def best(self, certainty: float = 2.0) -> dict[str, list[float]]:
        """Per layer the gains less `certainty` standard errors, best first: what noise explains is zero or less."""
        corrected = [(mean - certainty * error).sort(descending=True) for mean, error in self.gains()]
        return {layer.name: values.tolist() for layer, (values, _) in zip(self.layers, corrected, strict=True)}

    def directions(self, layer: AdaptedLayer) -> tuple[Tensor, Tensor]:
        """The layer's candidates as unit rows u `(q, out)` and v `(q, in)`, in the order of `best`."""
        index = next(i for i, known in enumerate(self.layers) if known.name == layer.name)
        order = (self.gains()[index][0]).sort(descending=True).indices
        return self.left[index].T[order], self.right[index][order]

    def tensors(self) -> dict[str, Tensor]:
        """The state in the middle of a window, for a checkpoint."""
        lists = {name: getattr(self, name) for name in _STATE}
        named = {f"{name}.{index}": value for name, values in lists.items() for index, value in enumerate(values)}
        return {"done": torch.tensor([self.done, sum(self.parts)]), **named}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`, on a sketch made for the same window with the same generator."""
        device = self.layers[0].a.A.device
        self.done = int(tensors["done"][0])
        for name in _STATE:
            count = sum(key.startswith(f"{name}.") for key in tensors)
            setattr(self, name, [tensors[f"{name}.{index}"].to(device, copy=True) for index in range(count)])
        first, second, _ = self.parts
        if self.done >= first + second:
            self._probe_rows(self.right)
        elif self.done >= first:
            self._probe_columns(self.left)

    def remove(self) -> None:
        """Take the probes out of the slots."""
        for layer in self.layers:
            layer.a.probe = layer.b.probe = None

    def _choose(self) -> None:
        pairs = [torch.linalg.svd(total, full_matrices=False) for total in self.sums]
        self.left = [q @ U for q, (U, _, _) in zip(self.left, pairs, strict=True)]  # (out, q)
        self.right = [Vh for _, _, Vh in pairs]  # (q, in)
        self._probe_rows(self.right)
        self.gain_sum = [torch.zeros_like(S) for _, S, _ in pairs]
        self.gain_square_sum = [torch.zeros_like(S) for _, S, _ in pairs]

    def _probe_rows(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Fix the A side; the B side starts at zero and gets the gradient. Returns zero sums of its shape."""
        for layer, fixed in zip(self.layers, rows, strict=True):
            layer.a.probe = fixed
            layer.b.probe = fixed.new_zeros(layer.b.out_features, len(fixed)).requires_grad_()
        return [torch.zeros_like(layer.b.probe) for layer in self.layers]  # type: ignore[arg-type]

    def _probe_columns(self, columns: Sequence[Tensor]) -> list[Tensor]:
        for layer, fixed in zip(self.layers, columns, strict=True):
            layer.b.probe = fixed
            layer.a.probe = fixed.new_zeros(fixed.shape[1], layer.a.in_features).requires_grad_()
        return [torch.zeros_like(layer.a.probe) for layer in self.layers]  # type: ignore[arg-type]

    def _take_gradient(self, layer: AdaptedLayer) -> Tensor:
        probe = layer.b.probe if layer.b.probe is not None and layer.b.probe.requires_grad else layer.a.probe
        assert probe is not None
        gradient = torch.zeros_like(probe) if probe.grad is None else probe.grad / layer.scaling
        probe.grad = None
        return torch.where(gradient.isfinite().all(), gradient, torch.zeros_like(gradient)).detach()

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

In the third part triples can be *on trial*: switched off in the forward, each with its own row as a probe. What the
loss would gain by putting one back, sigma along its own (u, v), is then measured as that of the candidates which would
replace it: at a contribution of zero, on the same batches. The inputs' mean square along each v is measured beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pedyra.adapters.attach import AdaptedLayer, by_shape
from pedyra.core.importance import triple_lengths
from pedyra.core.swaps import Gain

_STATE = ("sums", "left", "right", "gain_sum", "gain_square_sum", "reach", "on_trial")

LEAST_STEPS = 4
"""One step for each of the first two parts, and two for the third, whose spread is the error of a gain."""

Trials = Mapping[str, Sequence[int]]
"""Layer -> indices of its triples that are switched off while their worth is measured."""


class GradientSketch:
    """The sketch of all layers over one window of `steps` optimizer steps; `q` candidate directions per layer."""

    def __init__(
        self,
        layers: Sequence[AdaptedLayer],
        *,
        q: int,
        steps: int,
        generator: torch.Generator,
    ) -> None:
        self.layers = layers
        self.q = [min(q, layer.a.in_features, layer.b.out_features) for layer in layers]
        assert steps >= LEAST_STEPS
        self.parts = (steps // 3, steps // 3, steps - 2 * (steps // 3))
        self.done = 0
        """Optimizer steps observed so far."""
        self.left: list[Tensor] = []
        self.right: list[Tensor] = []
        self.gain_sum: list[Tensor] = []
        self.gain_square_sum: list[Tensor] = []
        self.reach: list[Tensor] = []
        """In the third part `AFactor.reach` of every layer, which counts up in the forward."""
        self._table: tuple[int, list[list[Gain]]] | None = None
        """What was measured after so many steps."""
        self.on_trial: list[Tensor] = []
        """Per layer the indices of the triples that are switched off, in the third part."""
        omega = [
            torch.randn(n, layer.a.in_features, generator=generator) for n, layer in zip(self.q, layers, strict=True)
        ]
        self.sums = self._probe_rows([rows.to(layer.a.A.device) for rows, layer in zip(omega, layers, strict=True)])

    @torch.no_grad()
    def observe(self, loss_scale: float = 1.0) -> None:
        """Read the probes' gradients after one step's backward passes, and go on to the second part when it is time."""
        first, second, _ = self.parts
        gradients = [self._take_gradient(layer, loss_scale) for layer in self.layers]
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
            # Contiguous, as a checkpoint holds it: another layout would be multiplied in another order.
            self.left = [torch.linalg.qr(total).Q.contiguous() for total in self.sums]  # (out, q)
            self.sums = self._probe_columns(self.left)
        elif self.done == first + second:
            self._choose_candidates()

    @property
    def judges(self) -> bool:
        """Whether the third part begins with the next step."""
        first, second, _ = self.parts
        return self.done == first + second

    @torch.no_grad()
    def put_on_trial(self, chosen: Trials) -> None:
        """Switch these triples off for the third part, and measure them beside the candidates; when it `judges`."""
        self.on_trial = [torch.tensor(list(chosen.get(layer.name, ())), dtype=torch.long) for layer in self.layers]
        own = [_own_direction(layer, indices) for layer, indices in zip(self.layers, self.on_trial, strict=True)]
        self.left = [torch.cat([rows, u], 1).contiguous() for rows, (u, _) in zip(self.left, own, strict=True)]
        self.right = [torch.cat([rows, v]).contiguous() for rows, (_, v) in zip(self.right, own, strict=True)]
        self._judge()

    def gains(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer the mean of sigma over the steps of the third part and its standard error, each `(q + trials,)`.

        A handful of steps knows its own spread badly, and the direction that looks best is the one whose spread
        looks small by chance; so no error is below that of the layer's directions together.
        """
        n = self.done - self.parts[0] - self.parts[1]
        result = []
        for total, squares in zip(self.gain_sum, self.gain_square_sum, strict=True):
            mean = total / n
            variance = (squares / n - mean.square()).clamp_min(0) * n / (n - 1)
            result.append((mean, (variance.clamp_min(variance.mean()) / n).sqrt()))
        return result

    def reaches(self) -> list[Tensor]:
        """Per layer the mean square of its inputs along every v of the third part, `(q + trials,)`."""
        return [total[:-1] / total[-1].clamp_min(1) for total in self.reach]

    def candidates(self, certainty: float) -> dict[str, list[Gain]]:
        """Per layer the gains of its candidate directions, in the order of `directions`."""
        return {
            layer.name: sorted(gains[:q], key=lambda gain: -gain.surety(certainty))
            for layer, q, gains in zip(self.layers, self.q, self._measured(), strict=True)
        }

    def trials(self) -> dict[str, dict[int, Gain]]:
        """Per layer and triple on trial, what the loss would gain by putting it back."""
        tried = [length[i] for length, i in zip(lengths(self.layers), self.on_trial, strict=True)]
        every = iter(torch.cat(tried).tolist())
        result = {}
        for layer, q, indices, gains in zip(self.layers, self.q, self.on_trial, self._measured(), strict=True):
            tried = zip(indices.tolist(), gains[q:], strict=True)
            result[layer.name] = {index: replace(gain, length=next(every)) for index, gain in tried}
        return result

    def directions(self, layer: AdaptedLayer, certainty: float) -> tuple[Tensor, Tensor]:
        """The layer's candidates as unit rows u `(q, out)` and v `(q, in)`, surest gain first.

        The order is that in which a plan takes them, by what they surely save: what paid for a new triple is what it
        begins along.
        """
        index = next(i for i, known in enumerate(self.layers) if known.name == layer.name)
        gains = self._measured()[index][: self.q[index]]
        order = sorted(range(len(gains)), key=lambda i: -gains[i].surety(certainty))
        return self.left[index].T[order], self.right[index][order]

    def _measured(self) -> list[list[Gain]]:
        """Per layer the gain of every probe of the third part. One transfer to the host for all layers."""
        if self._table is not None and self._table[0] == self.done:
            return self._table[1]
        means, errors = zip(*self.gains(), strict=True)
        reaches = [total[:-1] / total[-1].clamp_min(1) for total in self.reach]
        rows = torch.stack([torch.cat(means), torch.cat(errors), torch.cat(reaches)], 1).tolist()
        numbers = iter(rows)
        self._table = self.done, [[Gain(*next(numbers)) for _ in mean] for mean in means]
        return self._table[1]

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
            self._switch_off()
            self._count_reach()
        elif self.done >= first:
            self._probe_columns(self.left)

    def remove(self) -> None:
        """Take the probes out of the slots and switch every triple on."""
        for layer in self.layers:
            layer.a.probe = layer.b.probe = layer.a.live = layer.a.reach = None

    def _choose_candidates(self) -> None:
        """The pairs (u, v) of the third part, from the SVD of the co-range's sums."""
        pairs = [torch.linalg.svd(total, full_matrices=False) for total in self.sums]
        # u are Q times the left vectors of X; a column of `left` goes with a row of `right`.
        self.left = [(q @ U).contiguous() for q, (U, _, _) in zip(self.left, pairs, strict=True)]
        self.right = [Vh.contiguous() for _, _, Vh in pairs]
        self.on_trial = [torch.zeros(0, dtype=torch.long) for _ in self.layers]
        self._judge()

    def _judge(self) -> None:
        self._probe_rows(self.right)
        self._switch_off()
        self.gain_sum = [torch.zeros(len(rows), device=rows.device) for rows in self.right]
        self.gain_square_sum = [torch.zeros_like(total) for total in self.gain_sum]
        self.reach = [torch.zeros(len(rows) + 1, device=rows.device) for rows in self.right]
        self._count_reach()

    def _count_reach(self) -> None:
        for layer, reach in zip(self.layers, self.reach, strict=True):
            layer.a.reach = reach

    def _switch_off(self) -> None:
        if not any(len(indices) for indices in self.on_trial):
            return
        for layer, indices in zip(self.layers, self.on_trial, strict=True):  # all layers: one graph for a compiler
            layer.a.live = torch.ones(layer.rank, device=layer.a.A.device)
            layer.a.live[indices] = 0

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

    def _take_gradient(self, layer: AdaptedLayer, loss_scale: float) -> Tensor:
        probe = layer.b.probe if layer.b.probe is not None and layer.b.probe.requires_grad else layer.a.probe
        assert probe is not None
        gradient = torch.zeros_like(probe) if probe.grad is None else probe.grad / (layer.scaling * loss_scale)
        probe.grad = None
        # A step that overflowed counts as one of no gradient, which makes a gain smaller and its error larger.
        return torch.where(gradient.isfinite().all(), gradient, torch.zeros_like(gradient)).detach()


@torch.no_grad()
def lengths(layers: Sequence[AdaptedLayer]) -> list[Tensor]:
    """||s b e a|| of each triple of every layer with its scaling s, `(r,)`, float32."""
    result = [torch.empty(0)] * len(layers)
    for members in by_shape(layers):
        A, E, B = (
            torch.stack([factor.detach().float() for factor in each])
            for each in zip(*((layers[i].a.A, layers[i].a.E, layers[i].b.weight) for i in members), strict=True)
        )
        for index, unscaled in zip(members, triple_lengths(A, E, B), strict=True):
            result[index] = layers[index].scaling * unscaled
    return result


def _own_direction(layer: AdaptedLayer, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(u `(out, n)`, v `(n, in)`) of these triples, such that adding along -u v^T is putting them back."""
    A = layer.a.A.detach()[indices].float()
    B = (layer.b.weight * layer.a.E).detach()[:, indices].float()
    return -torch.nn.functional.normalize(B, dim=0), torch.nn.functional.normalize(A, dim=1)

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

In the third part triples, or directions across a layer's triples, can be *on trial*: switched off in the forward, each
with its own row as a probe. What the loss would gain by putting one back, sigma along its own (u, v), is then measured
as that of the candidates which would replace it: at a contribution of zero, on the same batches. The inputs' mean
square along each v is measured beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, islice

import torch
from torch import Tensor

from pedyra.allocate.batching import per_matrix
from pedyra.allocate.distributed import Average, one_process
from pedyra.allocate.input_energy import NO_TOKEN, per_element
from pedyra.allocate.schedule import LEAST_STEPS, parts_of
from pedyra.lora.layer import AdaptedLayer
from pedyra.methods.pedyra.noise import chance, means_and_errors
from pedyra.methods.pedyra.probes import Probes
from pedyra.methods.pedyra.swaps import Gain, surest_first
from pedyra.methods.pedyra.turning import directions_of, leaving_out, lengths

_FLAT = ("sums", "values", "energy")
_PER_LAYER = ("left", "right", "on_trial", "turned")

Chosen = Mapping[str, Sequence[int]]
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
        average: Average = one_process,
    ) -> None:
        self.layers = layers
        self._probes = Probes(layers, average)
        self.q = [min(q, layer.a.in_features, layer.b.out_features) for layer in layers]
        assert steps >= LEAST_STEPS
        self.parts = parts_of(steps)
        self.done = 0
        """Optimizer steps observed so far."""
        self.left: list[Tensor] = []
        self.right: list[Tensor] = []
        device = layers[0].a.A.device
        self.values = torch.zeros(0, 0, device=device)
        """sigma in every step of the third part, `(steps, probes)`, all layers' probes in a row."""
        self.energy = torch.zeros(0, device=device)
        """In the third part the sum of `AFactor.energy` of every layer, which counts up in one step."""
        self._table: tuple[int, list[list[Gain]]] | None = None
        """What was measured after so many steps."""
        self.on_trial: list[Tensor] = []
        """Per layer the indices of the triples that are switched off, in the third part."""
        self.turned: list[Tensor] = []
        """Per layer W `(r, r)`: those triples are rows of W A and columns of B W^-1. A and B stay as they are."""
        omega = [
            torch.randn(n, layer.a.in_features, generator=generator) for n, layer in zip(self.q, layers, strict=True)
        ]
        self._probes.fix_rows([rows.to(device) for rows in omega])
        self.sums = self._probes.zeros()
        """Of the probes' gradients in the first two parts, all layers' in a row."""

    @torch.no_grad()
    def observe(self, loss_scale: float = 1.0) -> None:
        """Read the probes' gradients after one step's backward passes, and go on to the next part when it is time."""
        first, second, _ = self.parts
        if self.done < first + second:
            self.sums += self._probes.take_gradients(loss_scale)
        else:
            energies = [layer.a.energy for layer in self.layers if layer.a.energy is not None]
            taken = self._probes.take_gradients(loss_scale, energies)
            gradients, energy = taken.tensor_split([self._probes.elements])
            # A sum over processes: it weighs the same where a run goes on with more or fewer of them.
            self.energy += self._finite(energy * self._probes.average.processes)
            torch._foreach_zero_(energies)
            products = torch._foreach_mul(self.left, self._probes.by_layer(gradients))  # gradient: G v^T, (out, q)
            self.values[self.done - first - second] = torch.cat([each.sum(0) for each in products]) / self._scaling
        self.done += 1
        if self.done == first:
            (self.left,) = per_matrix(
                lambda sums: (torch.linalg.qr(sums).Q,), self._probes.by_layer(self.sums)
            )  # (out, q)
            self._probes.fix_columns(self.left)
            self.sums = self._probes.zeros()
        elif self.done == first + second:
            self._choose_candidates()

    def skip(self) -> None:
        """Forget what the backward passes since the last step have left: that step is not taken."""
        self._probes.drop_gradients()
        for layer in self.layers:
            if layer.a.energy is not None:
                layer.a.energy.zero_()

    @property
    def complete(self) -> bool:
        """Whether the whole window has been observed."""
        return self.done == sum(self.parts)

    @property
    def judges(self) -> bool:
        """Whether the third part begins with the next step."""
        first, second, _ = self.parts
        return self.done == first + second

    @torch.no_grad()
    def put_on_trial(self, chosen: Chosen, turns: Mapping[str, Tensor] = {}) -> None:
        """Switch these triples off for the third part, and measure them beside the candidates; when it `judges`.

        Args:
            turns: layer -> W `(r, r)`, with which its triples are to be turned for the trial.
        """
        as_they_are = (torch.eye(layer.rank, device=layer.a.A.device) for layer in self.layers)
        self.turned = [turns.get(layer.name, eye) for layer, eye in zip(self.layers, as_they_are, strict=True)]
        self.on_trial = [torch.tensor(list(chosen.get(layer.name, ())), dtype=torch.long) for layer in self.layers]
        for i in self._tried:
            u, v = directions_of(self.layers[i], self.on_trial[i], self.turned[i])
            self.left[i] = torch.cat([self.left[i], u], 1).contiguous()
            self.right[i] = torch.cat([self.right[i], v]).contiguous()
        self._judge()

    def gains(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer the mean of sigma over the steps of the third part and its standard error, each `(q + trials,)`."""
        widths = [len(rows) for rows in self.right]
        mean, error = means_and_errors(self._seen(), self._owner)
        return list(zip(mean.split(widths), error.split(widths), strict=True))

    def chance(self, certainty: float) -> float:
        """The bound of `core.noise.chance` among all candidates, in standard errors."""
        among = [i < q for rows, q in zip(self.right, self.q, strict=True) for i in range(len(rows))]
        return chance(self._seen(), self._owner, torch.tensor(among), certainty)

    @property
    def _tried(self) -> list[int]:
        """Numbers of the layers that have triples on trial."""
        return [i for i, indices in enumerate(self.on_trial) if len(indices)]

    def _seen(self) -> Tensor:
        """sigma in the steps of the third part so far."""
        return self.values[: self.done - self.parts[0] - self.parts[1]]

    def _finite(self, energy: Tensor) -> Tensor:
        """`energy` of one step without the layers whose inputs overflowed: neither their sums nor their tokens."""
        total = energy.new_zeros(len(self.layers)).index_add_(0, self._energy_owner, energy)
        return torch.where(total.isfinite().index_select(0, self._energy_owner), energy, 0.0)

    def _energies(self) -> Tensor:
        """The mean square of the inputs along every v of the third part, all layers' in a row."""
        # In `energy` each layer's sums are followed by its count of tokens.
        ends = [end + layer for layer, end in enumerate(accumulate(len(rows) for rows in self.right))]
        sums_at = torch.arange(len(self._owner), device=self._owner.device) + self._owner
        tokens = self.energy[torch.tensor(ends, device=self._owner.device)]
        return self.energy[sums_at] / tokens.clamp_min(NO_TOKEN)[self._owner]

    def candidates(self, certainty: float, least: float = 0.0) -> dict[str, list[Gain]]:
        """Per layer the gains of its candidate directions, in the order of `directions`.

        Args:
            certainty: errors that are taken off a gain.
            least: errors beyond which a plan takes one at all.
        """
        return {
            layer.name: [gains[i] for i in surest_first(gains[:q], certainty, least)]
            for layer, q, gains in zip(self.layers, self.q, self._measured(), strict=True)
        }

    def trials(self) -> dict[str, dict[int, Gain]]:
        """Per layer and triple on trial, what the loss would gain by putting it back."""
        result: dict[str, dict[int, Gain]] = {layer.name: {} for layer in self.layers}
        tried = self._tried
        if not tried:
            return result
        found = lengths([self.layers[i] for i in tried], [self.turned[i] for i in tried])
        every = iter(torch.cat([each[self.on_trial[i]] for i, each in zip(tried, found, strict=True)]).tolist())
        measured = self._measured()
        for i in tried:
            gains = zip(self.on_trial[i].tolist(), measured[i][self.q[i] :], strict=True)
            result[self.layers[i].name] = {triple: gain._replace(length=next(every)) for triple, gain in gains}
        return result

    def directions(self, layer: AdaptedLayer, certainty: float, least: float = 0.0) -> tuple[Tensor, Tensor]:
        """The layer's candidates as unit rows u `(q, out)` and v `(q, in)`, surest gain first.

        The order is that in which a plan takes them, those beyond `least` errors by what they surely save: what paid
        for a new triple is what it begins along.
        """
        index = next(i for i, known in enumerate(self.layers) if known.name == layer.name)
        order = surest_first(self._measured()[index][: self.q[index]], certainty, least)
        return self.left[index].T[order], self.right[index][order]

    def _measured(self) -> list[list[Gain]]:
        """Per layer the gain of every probe of the third part. One transfer to the host for all layers."""
        if self._table is not None and self._table[0] == self.done:
            return self._table[1]
        rows = torch.stack([*means_and_errors(self._seen(), self._owner), self._energies()], 1).tolist()
        gains = (Gain(*row) for row in rows)
        self._table = self.done, [list(islice(gains, len(probed))) for probed in self.right]
        return self._table[1]

    def tensors(self) -> dict[str, Tensor]:
        """The state in the middle of a window, for a checkpoint."""
        lists = {name: getattr(self, name) for name in _PER_LAYER}
        named = {f"{name}.{index}": value for name, values in lists.items() for index, value in enumerate(values)}
        named |= {name: getattr(self, name) for name in _FLAT}
        return {"done": torch.tensor([self.done, sum(self.parts)]), **named}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`, on a sketch made for the same window with the same generator."""
        device = self.layers[0].a.A.device
        self.done = int(tensors["done"][0])
        for name in _FLAT:
            setattr(self, name, tensors[name].to(device, copy=True))
        for name in _PER_LAYER:
            count = sum(key.startswith(f"{name}.") for key in tensors)
            setattr(self, name, [tensors[f"{name}.{index}"].to(device, copy=True) for index in range(count)])
        first, second, _ = self.parts
        if self.done >= first + second:
            self._measure_with(self.right)
            self._switch_off()
        elif self.done >= first:
            self._probes.fix_columns(self.left)

    def remove(self) -> None:
        """Take the probes out of the slots and switch every triple on; nothing where that is done."""
        self._probes.remove()

    def _choose_candidates(self) -> None:
        """The pairs (u, v) of the third part, from the SVD of the co-range's sums."""
        left, _, self.right = per_matrix(
            lambda sums: tuple(torch.linalg.svd(sums, full_matrices=False)), self._probes.by_layer(self.sums)
        )
        # u are Q times the left vectors of X; a column of `left` goes with a row of `right`.
        self.left = [q @ U for q, U in zip(self.left, left, strict=True)]
        self.sums = self.sums.new_zeros(0)
        self.on_trial = [torch.zeros(0, dtype=torch.long) for _ in self.layers]
        self._judge()

    def _judge(self) -> None:
        self._measure_with(self.right)
        self._switch_off()
        self.values = self._scaling.new_zeros(self.parts[2], len(self._scaling))
        self.energy = self._scaling.new_zeros(sum(len(rows) + 1 for rows in self.right))

    def _measure_with(self, rows: Sequence[Tensor]) -> None:
        """Probe these rows; the products of their gradients with `left` are sigma, times the scaling of the layer."""
        self._probes.fix_rows(rows)
        widths, device = [len(probed) for probed in rows], rows[0].device
        self._scaling = per_element(torch.tensor([layer.scaling for layer in self.layers], device=device), widths)
        self._owner = per_element(torch.arange(len(widths), device=device), widths)
        """Of every gain, the number of its layer."""
        self._energy_owner = per_element(torch.arange(len(widths), device=device), [width + 1 for width in widths])
        for layer, probed in zip(self.layers, rows, strict=True):
            layer.a.energy = probed.new_zeros(len(probed) + 1)

    def _switch_off(self) -> None:
        if not self._tried:
            return
        for layer, indices, W in zip(self.layers, self.on_trial, self.turned, strict=True):
            # All layers have one: one graph for a compiler.
            all_on = torch.eye(layer.rank, device=W.device)
            layer.a.kept_directions = leaving_out(W, indices) if len(indices) else all_on

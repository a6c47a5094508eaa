"""Probes beside the factors of every layer, of which one side is fixed and the other, zero, takes the gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pedyra.allocate.claim import switch_on
from pedyra.allocate.distributed import Average
from pedyra.allocate.input_energy import per_element
from pedyra.lora.layer import AdaptedLayer
from pedyra.methods.triple_scores import SPIKE


class Probes:
    """The probes of all layers at one time: rows in the A slots or columns in the B slots, see `gradient_sketch`."""

    def __init__(self, layers: Sequence[AdaptedLayer], average: Average) -> None:
        self.layers, self.average = layers, average
        self._probes: list[Tensor] = []

    def fix_rows(self, rows: Sequence[Tensor]) -> None:
        """Fix the A side; the B side starts at zero and gets the gradient, `(out, q)`."""
        for layer, fixed in zip(self.layers, rows, strict=True):
            layer.a.probe = fixed
            layer.b.probe = fixed.new_zeros(layer.b.out_features, len(fixed)).requires_grad_()
        self._hold([layer.b.probe for layer in self.layers])  # type: ignore[misc]

    def fix_columns(self, columns: Sequence[Tensor]) -> None:
        """Fix the B side; the A side starts at zero and gets the gradient, `(q, in)`."""
        for layer, fixed in zip(self.layers, columns, strict=True):
            layer.b.probe = fixed
            layer.a.probe = fixed.new_zeros(fixed.shape[1], layer.a.in_features).requires_grad_()
        self._hold([layer.a.probe for layer in self.layers])  # type: ignore[misc]

    def _hold(self, probes: list[Tensor]) -> None:
        self._probes, self._sizes = probes, [probe.numel() for probe in probes]
        index = torch.arange(len(probes), device=probes[0].device)
        self._layer_of = per_element(index, self._sizes)
        """Of every element of the probes in a row, the number of its layer."""

    @property
    def elements(self) -> int:
        """Of all probes together."""
        return sum(self._sizes)

    def zeros(self) -> Tensor:
        """One for every element, in a row."""
        return torch.zeros(self.elements, device=self._probes[0].device)

    def by_layer(self, flat: Tensor) -> list[Tensor]:
        """One matrix a layer, of its probe's shape."""
        return [part.view_as(probe) for part, probe in zip(flat.split(self._sizes), self._probes, strict=True)]

    def take_gradients(self, loss_scale: float, also: Sequence[Tensor] = ()) -> Tensor:
        """The gradients of all probes in a row, of the unscaled loss, and after them `also`, averaged with them.

        A layer whose gradient overflowed, or is beyond `SPIKE`, has none in this step, which makes a gain smaller and
        its error larger: probes are longer than rows of A, so a GradScaler may have seen nothing.
        """
        gradients = [torch.zeros_like(probe) if probe.grad is None else probe.grad for probe in self._probes]
        flat = self.average(torch.cat([part.reshape(-1) for part in (*gradients, *also)]))
        for probe in self._probes:
            probe.grad = None
        flat, rest = flat.split([len(self._layer_of), len(flat) - len(self._layer_of)])
        finite = torch.stack(torch._foreach_norm(flat.split(self._sizes))) / loss_scale < SPIKE
        # index_select: a quarter of the time of an index in brackets.
        return torch.cat([torch.where(finite.index_select(0, self._layer_of), flat / loss_scale, 0.0), rest])

    def drop_gradients(self) -> None:
        """Forget the gradients of a step that is not taken."""
        for probe in self._probes:
            probe.grad = None

    def remove(self) -> None:
        """Take the probes out of the slots and switch every triple on; nothing where that is done."""
        if not self._probes:
            return
        self._probes = []
        switch_on(self.layers)

"""IncreLoRA's score: how much a layer's dense update matters, from |update * gradient| and its moving averages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pedyra.config import Importance, RankConfig
from pedyra.lora.attach import AdaptedLayer
from pedyra.methods.importance import update_sensitivity_
from pedyra.methods.layer_scores import LayerScores

_BLOCK_ELEMENTS = 1 << 20
"""At most this much of one layer's dense gradient exists at a time: 4 MB."""


def dense_sensitivity(x: Tensor, gradient: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
    """sum |dW * dL/d dW| / sqrt(out in) of the update dW = B diag(E) A, in blocks of rows.

    Args:
        x: input of the A slot, `(..., in)`.
        gradient: dL / d(output of the B slot), `(..., out)`; with it the scaling, which dW has too, cancels.
    """
    x, gradient = x.reshape(-1, x.shape[-1]).float(), gradient.reshape(-1, gradient.shape[-1]).float()
    weight = E.float()[:, None] * A.float()
    total = weight.new_zeros(())
    rows = max(1, _BLOCK_ELEMENTS // A.shape[1])
    for g, b in zip(gradient.split(rows, 1), B.float().split(rows, 0), strict=True):
        total += ((b @ weight) * (g.T @ x)).abs().sum()
    return total / (A.shape[1] * B.shape[0]) ** 0.5


class DenseSensitivity(LayerScores):
    """Eq. (3)'s two averages of `dense_sensitivity`; a layer's score is their product.

    Hooks on the two slots see the input and, in the backward pass, the gradient; the dense gradient is never kept. With
    gradient accumulation the values of the micro-batches are summed, where |sum| of all would need it.
    """

    def __init__(self, model: nn.Module, layers: Sequence[AdaptedLayer], config: RankConfig) -> None:
        super().__init__(layers, ("sensitivity", "uncertainty"))
        importance = config.importance or Importance()
        self.beta1, self.beta2 = importance.beta1, importance.beta2
        self.now = torch.zeros_like(self.state["sensitivity"])
        """What the backward passes of this step have added so far."""
        self._inputs: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def layer_scores(self) -> Tensor:
        return self.state["sensitivity"] * self.state["uncertainty"]

    def watch(self, active: bool) -> None:
        if active and not self._handles:
            for index, layer in enumerate(self.layers):
                see_input = lambda module, args, index=index: self._inputs.update({index: args[0].detach()})  # noqa: E731
                see_output = lambda module, args, output, index=index: self._see_output(index, output)  # noqa: E731
                self._handles.append(layer.a.register_forward_pre_hook(see_input))
                self._handles.append(layer.b.register_forward_hook(see_output))
        elif not active:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            self._inputs.clear()

    def restart(self) -> None:
        for value in self.state.values():
            value.zero_()

    @torch.no_grad()
    def observe_gradients(self, *, loss_scale: float = 1.0) -> None:
        sensitivity, uncertainty = self.state["sensitivity"], self.state["uncertainty"]
        now = self.now / loss_scale
        self.skipped += ~update_sensitivity_(sensitivity, uncertainty, now, beta1=self.beta1, beta2=self.beta2)
        self.now = torch.zeros_like(sensitivity)

    def _see_output(self, index: int, output: Tensor) -> None:
        x = self._inputs.pop(index, None)
        if x is None or not output.requires_grad or not self.layers[index].module.training:
            return
        layer = self.layers[index]

        @torch.no_grad()
        def see_gradient(gradient: Tensor) -> None:
            self.now[index] += dense_sensitivity(x, gradient, layer.a.A, layer.a.E, layer.b.weight)

        output.register_hook(see_gradient)

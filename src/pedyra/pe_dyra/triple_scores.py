"""PE-DyRA's scores, Algorithm 1: Eq. (3)'s averages weighed by gradient norms, mixed with what the inputs say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pedyra.allocate.contract import Run
from pedyra.allocate.scores import Sensitivity
from pedyra.errors import UserError
from pedyra.lora.replacement import Replacement
from pedyra.pe_dyra.equations import (
    gradient_scores,
    gradient_weights,
    input_scores,
    mix_scores,
    two_thirds_log_variance,
)
from pedyra.pe_dyra.input_energy import InputEnergy, per_element


class TripleScores(Sensitivity):
    """PE-DyRA weighs the importance of A, E and B by Eq. (5)'s gradient norms, and mixes in Eq. (6)'s input scores.

    `energies` are the EMA of the inputs' mean square per layer. At alpha = 0 there is no Eq. (3), and no state of the
    parameters' size; at alpha = 1 there is no Eq. (6), and nothing looks at inputs.
    """

    def __init__(self, run: Run, settings: Any) -> None:
        self.inputs = InputEnergy(run.model, run.layers, run.average) if settings.alpha < 1 else None
        super().__init__(run, settings)

    @property
    def tracks(self) -> bool:  # type: ignore[override]
        return self.settings.alpha > 0

    def watch(self, active: bool) -> None:
        if self.inputs is not None:
            self.inputs.active = active

    def restart(self) -> None:
        super().restart()
        self.energies = [torch.zeros(layer.a.in_features, device=self.skipped.device) for layer in self.layers]
        self._inputs: Tensor | None = None
        """Eq. (6) of the weights before the step that an adjustment follows, until the next step."""
        self._trained_unseen: dict[str, Tensor] = {}
        """Layer whose input was not seen in some step of the window -> whether it had a gradient there, `()`."""

    def observe(self, *, loss_scale: float, begins: bool, adjusts: bool) -> None:
        self.observe_gradients()
        self._inputs = None
        if self.inputs is not None:
            mean_squares = self.inputs.collect()
            self._note_unseen(mean_squares)
            if begins or adjusts:  # each look waits for the device
                self._check_seen()
            self.observe_inputs(mean_squares)
        if adjusts:
            self._inputs = self._by_input()  # Eq. (6) reads the weights that Eq. (3) does, before the step

    def release(self) -> None:
        if self.inputs is not None:
            self.inputs.remove()

    def details(self, means: Mapping[str, float]) -> dict[str, Any]:
        ranks = {layer.name: layer.rank for layer in self.layers}
        return {**super().details(means), "two_thirds_log_variance": two_thirds_log_variance(means, ranks)}

    def _note_unseen(self, mean_squares: Sequence[Tensor | None]) -> None:
        for layer, mean_square in zip(self.layers, mean_squares, strict=True):
            gradients = [factor.grad for factor in layer.factors if factor.grad is not None]
            if mean_square is None and gradients and layer.rank:
                moved = torch.stack(torch._foreach_norm(gradients)).any()
                self._trained_unseen[layer.name] = moved | self._trained_unseen.get(layer.name, False)

    def _check_seen(self) -> None:
        """Raise ValueError for a layer that was trained and whose input was not seen: Eq. (6) is unknown, not zero."""
        for name, moved in self._trained_unseen.items():
            if moved:
                raise UserError(
                    f"no input of {name} was seen, although it is trained: something reads its weights and does not "
                    f"call it (a fused kernel of unsloth or axolotl), so its input score, Eq. (6), is unknown; switch "
                    f"the kernel off, or use alpha=1, which needs no inputs"
                )

    @torch.no_grad()
    def observe_inputs(self, mean_squares: Sequence[Tensor | None]) -> None:
        """Move the EMA of the input energy on by a step; a layer without an input, or with an infinite one, keeps its
        value."""
        indices = [index for index, mean_square in enumerate(mean_squares) if mean_square is not None]
        if not indices:
            return
        fresh = [mean_square for mean_square in mean_squares if mean_square is not None]
        widths = [len(mean_square) for mean_square in fresh]
        # All layers in a handful of operations: on a GPU launches are what costs.
        finite = per_element(torch.stack(torch._foreach_norm(fresh, 1)).isfinite(), widths)
        energy = torch.cat([self.energies[index] for index in indices])
        energy.lerp_(torch.where(finite, torch.cat(fresh), energy), 1 - self.settings.beta1)
        for index, value in zip(indices, energy.split(widths), strict=True):
            self.energies[index] = value

    @torch.no_grad()
    def triple_scores(self) -> dict[str, list[float]]:
        """Follow Algorithm 1: return the score of every triple, by layer name. One transfer to the host."""
        of = self.settings
        inputs = self._by_input() if self._inputs is None else self._inputs
        gradient = self._by_gradient() if self.tracks else torch.zeros_like(inputs)
        return self.by_layer(mix_scores(gradient, inputs, alpha=of.alpha, norm=of.score_norm))

    @torch.no_grad()
    def _by_input(self) -> Tensor:
        by_input = []
        for layer, energy in zip(self.layers, self.energies, strict=True):
            A, E, B = (factor.detach().float() for factor in layer.factors)
            norms = energy.sqrt() if self.settings.input_norm == "rms" else energy
            by_input.append(input_scores(A, E * layer.share_at(layer.rank), B, norms))
        return torch.cat(by_input)

    def _by_gradient(self) -> Tensor:
        weights = gradient_weights(self.norms)
        if self.settings.omega == "uniform":  # AdaLoRA's plain sum
            weights = torch.ones_like(weights)
        return torch.cat([gradient_scores(*of, weight) for of, weight in zip(self.importance(), weights, strict=True)])

    def resize(self, replacements: Mapping[str, Sequence[Replacement]]) -> None:
        self._inputs = None
        super().resize(replacements)

    def tensors(self) -> dict[str, Tensor]:
        energies = zip(self.layers, self.energies, strict=True)
        return {**super().tensors(), **{f"energy.{layer.name}": energy for layer, energy in energies}}

    def _load(self, tensors: dict[str, Tensor]) -> None:
        super()._load(tensors)
        self.energies = [tensors[f"energy.{layer.name}"] for layer in self.layers]

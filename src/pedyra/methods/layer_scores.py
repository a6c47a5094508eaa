"""Scores that are one number per layer, for methods that only decide which layers grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.resize import Replacement


class LayerScores:
    """A `ScoreState` whose every triple has its layer's score. `state` `(layers,)` tensors go into checkpoints."""

    def __init__(self, layers: Sequence[AdaptedLayer], names: Sequence[str]) -> None:
        self.layers = layers
        device = layers[0].a.A.device
        self.skipped = torch.zeros((), dtype=torch.long, device=device)
        self.state = {name: torch.zeros(len(layers), device=device) for name in names}

    def layer_scores(self) -> Tensor:
        """The score of each layer `(layers,)`."""
        raise NotImplementedError

    def watch(self, active: bool) -> None:
        """See `ScoreState`."""

    def restart(self) -> None:
        """See `ScoreState`."""

    def observe_gradients(self, *, loss_scale: float = 1.0) -> None:
        """See `ScoreState`."""

    @torch.no_grad()
    def triple_scores(self, *, alpha: float, score_norm: str, input_norm: str, omega: str) -> dict[str, list[float]]:
        """See `ScoreState`; PE-DyRA's settings have no meaning here."""
        scores = self.layer_scores().tolist()
        return {layer.name: [score] * layer.rank for layer, score in zip(self.layers, scores, strict=True)}

    def resize(self, replacements: Mapping[str, Sequence[Replacement]]) -> None:
        """See `ScoreState`."""

    def tensors(self) -> dict[str, Tensor]:
        """See `ScoreState`."""
        return {"skipped": self.skipped, **self.state}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """See `ScoreState`."""
        for name, now in self.tensors().items():
            if name not in tensors or tensors[name].shape != now.shape:
                raise ValueError(f"score state {name!r} is missing or not of shape {tuple(now.shape)}")
        device = self.skipped.device
        self.skipped = tensors["skipped"].to(device, copy=True)
        self.state = {name: tensors[name].to(device, copy=True) for name in self.state}

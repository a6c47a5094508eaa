"""What methods score triples by: the running state behind scores, and AdaLoRA's, Eq. (3) of every element."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pedyra.allocate.contract import Run
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.replacement import Replacement, select_rows

SPIKE = 1e15
"""A gradient norm at or beyond it is a step that scores leave out: what is made of it would overflow."""


def update_sensitivity_(
    sensitivity: Float[Tensor, " n"],
    uncertainty: Float[Tensor, " n"],
    product: Float[Tensor, " n"],
    *,
    beta1: float,
    beta2: float,
    finite: Bool[Tensor, ""] | None = None,
) -> Bool[Tensor, ""]:
    """Eq. (3), in place: the two moving averages of one optimizer step, `product` being |w * grad|, element-wise.

    The uncertainty uses the sensitivity of this step, already updated, as Eq. (3) writes it. A step that is not
    `finite` (overflow of fp16, a NaN loss), by default one with any non-finite product, leaves both averages as they
    were, without a synchronisation. Returns whether it was, as a tensor; `product` is used up.
    """
    if finite is None:
        finite = product.sum().isfinite()  # of values that are not negative: any that is not finite shows in the sum
    torch.where(finite, product, sensitivity, out=product)
    sensitivity.lerp_(product, 1 - beta1)
    product.sub_(sensitivity).abs_()
    torch.where(finite, product, uncertainty, out=product)
    uncertainty.lerp_(product, 1 - beta2)
    return finite


class ScoreState:
    """What a method scores triples by observes the optimizer steps that `ScoredRun.observes`. Here every triple has its
    layer's score, for methods that decide which layers grow. `state`, `(layers,)` by name, goes into checkpoints."""

    compiles = True
    """Observing works in a model that torch compiles, which passes over hooks that come later."""
    in_processes = False
    """Processes that see parts of a batch have the same scores."""

    def __init__(self, run: Run, settings: Any, names: Sequence[str] = ()) -> None:
        self.layers, self.settings = run.layers, settings
        device = self.layers[0].a.A.device
        self.skipped: Tensor = torch.zeros((), dtype=torch.long, device=device)
        """Number of steps left out for a non-finite observation."""
        self.state = {name: torch.zeros(len(self.layers), device=device) for name in names}

    def layer_scores(self) -> Tensor:
        """Return the score of each layer `(layers,)`."""
        raise NotImplementedError

    def watch(self, active: bool) -> None:
        """Make ready, before each step, to observe it or not, for sources that look at more than gradients."""

    def restart(self) -> None:
        """Forget what was observed: a new window of observed steps begins."""

    def observe(self, *, loss_scale: float, begins: bool, adjusts: bool) -> None:
        """Take in one optimizer step, whose gradients are complete; what was seen beside them is `loss_scale` times as
        large. `begins`: it is the first after `restart`; `adjusts`: an adjustment follows it."""

    @property
    def observed(self) -> bool:
        """Say whether there is anything to judge the triples by."""
        return True

    @torch.no_grad()
    def triple_scores(self) -> dict[str, list[float]]:
        """Return the score of every triple by layer name, in the model's order; changes nothing."""
        scores = self.layer_scores().tolist()
        return {layer.name: [score] * layer.rank for layer, score in zip(self.layers, scores, strict=True)}

    def details(self, means: Mapping[str, float]) -> dict[str, Any]:
        """Return further fields of `ScoredRun.snapshot`, from the mean score of every layer."""
        return {}

    def resize(self, replacements: Mapping[str, Sequence[Replacement]]) -> None:
        """Follow an adjustment, whose resizes (perhaps none) are installed."""

    def release(self) -> None:
        """Leave nothing in the model."""
        self.watch(False)

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole state as named tensors, for a checkpoint."""
        return {"skipped": self.skipped, **self.state}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Do the inverse of `tensors`, once the ranks are those of the saved state."""
        self._load({name: tensors[name].to(self.skipped.device, copy=True) for name in self.tensors()})

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self.skipped = tensors.pop("skipped")
        self.state = tensors


class Sensitivity(ScoreState):
    """AdaLoRA's scores: sensitivity and uncertainty of every element in float32, Eq. (3), flat, A, E, B layer by layer.

    An element's importance is their product, and a triple's score the mean over A's row and B's column plus that of E.
    `norms (layers, 3)` are the gradient norms of (A, E, B), `any_finite` whether any step of the window was, `skipped`
    the number of steps left out for a gradient beyond `SPIKE`.
    """

    in_processes = True
    tracks = True
    """There is Eq. (3), and a state of the parameters' size."""

    def __init__(self, run: Run, settings: Any) -> None:
        super().__init__(run, settings)
        self.restart()

    def restart(self) -> None:
        """Forget everything but the counts of what was skipped: the state of a run that has seen no gradient."""
        device = self.skipped.device
        elements = sum(factor.numel() for factor in _factors(self.layers)) if self.tracks else 0
        self.sensitivity, self.uncertainty = torch.zeros(2, elements, device=device).unbind()
        self.norms = torch.zeros(len(self.layers), 3, device=device)
        self.any_finite = torch.zeros((), dtype=torch.bool, device=device)

    def observe(self, *, loss_scale: float, begins: bool, adjusts: bool) -> None:
        self.observe_gradients()

    @torch.no_grad()
    def observe_gradients(self) -> None:
        """Take in Eq. (3) of one optimizer step, from the gradients as they are now; a missing one is zero."""
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        zero = torch.zeros((), device=self.skipped.device)
        factors = _factors(self.layers)
        gradients = [parameter.grad for parameter in factors]
        present = [gradient.float() for gradient in gradients if gradient is not None]
        present_norms = iter(torch._foreach_norm(present) if present else ())
        norms = torch.stack([zero if gradient is None else next(present_norms) for gradient in gradients]).view(-1, 3)
        del present  # copies of half precision
        finite = (norms < SPIKE).all()
        if self.tracks:
            weights = [parameter.detach().float() for parameter in factors]
            slopes = [(torch.zeros_like(p) if p.grad is None else p.grad).float() for p in factors]
            products = torch._foreach_mul(weights, slopes)
            product = torch.cat([value.reshape(-1) for value in products]).abs_()
            averages = self.sensitivity, self.uncertainty
            update_sensitivity_(*averages, product, beta1=beta1, beta2=beta2, finite=finite)
        self.skipped += ~finite
        self.any_finite = self.any_finite | finite
        self.norms = torch.where(finite, norms, self.norms)

    @property
    def observed(self) -> bool:
        """Tell whether any step of the window had a finite gradient; else the averages are unknown, not zero."""
        return bool(self.any_finite)

    @torch.no_grad()
    def triple_scores(self) -> dict[str, list[float]]:
        """Return AdaLoRA's score of every triple, by layer name. One transfer to the host."""
        return self.by_layer(torch.cat([A.mean(1) + E + B.mean(0) for A, E, B in self.importance()]))

    def importance(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the importance S of every element of A `(r, in)`, E `(r,)` and B `(out, r)`, by layer."""
        averages = zip(self._by_factor(self.sensitivity), self._by_factor(self.uncertainty), strict=True)
        factors = (sensitivity * uncertainty for sensitivity, uncertainty in averages)  # of A, E, B, A ... in turn
        return zip(factors, factors, factors, strict=True)

    def by_layer(self, scores: Float[Tensor, " triples"]) -> dict[str, list[float]]:
        """Cut the scores of all triples, in the model's order, into those of each layer."""
        values = iter(scores.tolist())
        return {layer.name: list(islice(values, layer.rank)) for layer in self.layers}

    def details(self, means: Mapping[str, float]) -> dict[str, Any]:
        norms = zip(self.layers, self.norms.tolist(), strict=True)
        return {"grad_norms": {layer.name: of_factors for layer, of_factors in norms}}

    def resize(self, replacements: Mapping[str, Sequence[Replacement]]) -> None:
        """Follow a resize that is already installed: kept rows keep their averages, new ones start at zero."""
        if self.tracks and replacements:
            averages = self.sensitivity, self.uncertainty
            self.sensitivity, self.uncertainty = (_resized(flat, self.layers, replacements) for flat in averages)

    def _by_factor(self, flat: Tensor) -> Iterator[Tensor]:
        factors = _factors(self.layers)
        for part, parameter in zip(flat.split([factor.numel() for factor in factors]), factors, strict=True):
            yield part.view(parameter.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _SAVED}

    def _load(self, tensors: dict[str, Tensor]) -> None:
        for name in _SAVED:
            setattr(self, name, tensors[name])


_SAVED = ("sensitivity", "uncertainty", "norms", "any_finite", "skipped")


def _factors(layers: Sequence[AdaptedLayer]) -> list[Tensor]:
    return [factor for layer in layers for factor in layer.factors]


def _resized(flat: Tensor, layers: Sequence[AdaptedLayer], replacements: Mapping[str, Sequence[Replacement]]) -> Tensor:
    changes = {each.new: each for of_layer in replacements.values() for each in of_layer}
    parts, at = [], 0
    for new in _factors(layers):
        change = changes.get(new)
        old = new if change is None else change.old
        values = flat[at : at + old.numel()]
        at += old.numel()
        if change is not None:
            values = select_rows(values.view(old.shape), change.dim, change.indices, change.num_new)
        parts.append(values.reshape(-1))
    return torch.cat(parts)

"""The running state behind the scores of Algorithm 1: Eq. (3) over all triples at once, inputs, gradient norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pedyra.allocate.contract import Run
from pedyra.errors import UserError
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.replacement import Replacement, select_rows
from pedyra.pe_dyra.equations import (
    gradient_scores,
    gradient_weights,
    input_scores,
    mix_scores,
    two_thirds_log_variance,
    update_sensitivity_,
)
from pedyra.pe_dyra.input_energy import InputEnergy, per_element

SPIKE = 1e15
"""A gradient norm at or beyond it is a step that scores leave out: what is made of it would overflow."""

PIECE = 1 << 20
"""Elements of Eq. (3) that are held in one tensor: memory of more is taken anew from the system at every use."""


class ScoreState:
    """The source of a method's scores observes the optimizer steps that `ScoredRun.observes`.

    Here every triple has its layer's score, for methods that only decide which layers grow. `state`, `(layers,)`
    tensors by name, goes into checkpoints.
    """

    compiles = True
    """Observing works in a model that torch compiles, which passes over hooks that come later."""
    in_processes = False
    """Processes that see parts of a batch have the same scores."""

    def __init__(self, run: Run, settings: Any, names: Sequence[str] = ()) -> None:
        self.layers, self.settings = run.layers, settings
        device = self.layers[0].a.A.device
        self.skipped = torch.zeros((), dtype=torch.long, device=device)
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
        """Take in one optimizer step, whose gradients are complete.

        Args:
            loss_scale: what was seen beside the gradients is so many times as large.
            begins: the step is the first after `restart`.
            adjusts: an adjustment follows it.
        """

    @property
    def observed(self) -> bool:
        """Say whether there is anything to judge the triples by."""
        return True

    @torch.no_grad()
    def triple_scores(self) -> dict[str, list[float]]:
        """Return the score of every triple by layer name, in the model's order; changes nothing."""
        scores = self.layer_scores().tolist()
        return {layer.name: [score] * layer.rank for layer, score in zip(self.layers, scores, strict=True)}

    def shown(self, means: Mapping[str, float]) -> dict[str, Any]:
        """Return further fields of `MethodRun.snapshot`, from the mean score of every layer."""
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
        """Do the inverse of `tensors`; the ranks must already be those of the saved state. Raises ValueError: an entry
        is missing or has another shape."""
        for name, now in self.tensors().items():
            if name not in tensors or tensors[name].shape != now.shape:
                found = "missing" if name not in tensors else f"of shape {tuple(tensors[name].shape)}"
                raise UserError(f"score state {name!r} is {found}, expected shape {tuple(now.shape)}")
        self._load({name: tensors[name].to(self.skipped.device, copy=True) for name in self.tensors()})

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self.skipped = tensors.pop("skipped")
        self.state = tensors


class TripleScores(ScoreState):
    """PE-DyRA's scores hold sensitivity and uncertainty of every element in float32: flat, A, E, B of a layer, then the
    next, in pieces.

    A piece is some whole layers, when it is cut (`restart`) of `PIECE` elements or one layer more, so that a resize
    makes anew only those that hold a layer that changed. `norms (layers, 3)` are the gradient norms of (A, E, B) that
    Eq. (5) uses, `energies` the EMA of the inputs' mean square per layer, `seen` whether any step of the window was
    observed, `skipped` the number of steps left out for a gradient beyond `SPIKE`. At alpha = 0 there is no Eq. (3),
    and no state of the parameters' size; at alpha = 1 there is no Eq. (6), and nothing looks at inputs.
    """

    in_processes = True

    def __init__(self, run: Run, settings: Any) -> None:
        super().__init__(run, settings)
        self.inputs = InputEnergy(run.model, run.layers, run.average) if settings.alpha < 1 else None
        self.restart()

    def watch(self, active: bool) -> None:
        if self.inputs is not None:
            self.inputs.active = active

    def restart(self) -> None:
        """Forget everything but the counts of what was skipped: the state of a run that has seen no gradient."""
        device = self.skipped.device
        self._pieces = _pieces(self.layers) if self.settings.alpha > 0 else []
        self.sensitivity = [torch.zeros(_elements(piece), device=device) for piece in self._pieces]
        self.uncertainty = [torch.zeros(_elements(piece), device=device) for piece in self._pieces]
        self.norms = torch.zeros(len(self.layers), 3, device=device)
        self.seen = torch.zeros((), dtype=torch.bool, device=device)
        self.energies = [torch.zeros(layer.a.in_features, device=device) for layer in self.layers]
        self._inputs: Tensor | None = None
        """Eq. (6) of the weights before the step that an adjustment follows, until the next step."""
        self._trained_unseen: dict[str, Tensor] = {}
        """Layer whose input was not seen in some step of the window -> whether it had a gradient there, `()`."""

    def observe(self, *, loss_scale: float, begins: bool, adjusts: bool) -> None:
        self.observe_gradients()
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

    def shown(self, means: Mapping[str, float]) -> dict[str, Any]:
        norms = zip(self.layers, self.norms.tolist(), strict=True)
        ranks = {layer.name: layer.rank for layer in self.layers}
        return {
            "grad_norms": {layer.name: found for layer, found in norms},
            "two_thirds_log_variance": two_thirds_log_variance(means, ranks),
        }

    def _note_unseen(self, mean_squares: Sequence[Tensor | None]) -> None:
        for layer, seen in zip(self.layers, mean_squares, strict=True):
            gradients = [factor.grad for factor in layer.factors if factor.grad is not None]
            if seen is None and gradients and layer.rank:
                trained = torch.stack(torch._foreach_norm(gradients)).any()
                self._trained_unseen[layer.name] = trained | self._trained_unseen.get(layer.name, False)

    def _check_seen(self) -> None:
        """Raise ValueError for a layer that was trained and whose input was not seen: Eq. (6) is unknown, not zero."""
        for name, trained in self._trained_unseen.items():
            if trained:
                raise UserError(
                    f"no input of {name} was seen, although it is trained: something reads its weights and does not "
                    f"call it (a fused kernel of unsloth or axolotl), so its input score, Eq. (6), is unknown; switch "
                    f"the kernel off, or use alpha=1, which needs no inputs"
                )

    @torch.no_grad()
    def observe_gradients(self) -> None:
        """Take in Eqs. (3) and (5) of one optimizer step, from the gradients as they are now; a missing one is zero."""
        self._inputs = None
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        zero = torch.zeros((), device=self.skipped.device)
        found = [parameter.grad for parameter in _factors(self.layers)]
        given = [gradient.float() for gradient in found if gradient is not None]
        known = iter(torch._foreach_norm(given) if given else ())
        norms = torch.stack([zero if gradient is None else next(known) for gradient in found]).view(-1, 3)
        del given
        finite = (norms < SPIKE).all()
        for layers, sensitivity, uncertainty in zip(self._pieces, self.sensitivity, self.uncertainty, strict=True):
            factors = _factors(layers)
            weights = [parameter.detach().float() for parameter in factors]
            gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).float() for p in factors]
            products = torch._foreach_mul(weights, gradients)
            product = torch.cat([value.reshape(-1) for value in products]).abs_()
            update_sensitivity_(sensitivity, uncertainty, product, beta1=beta1, beta2=beta2, finite=finite)
        self.skipped += ~finite
        self.seen = self.seen | finite
        self.norms = torch.where(finite, norms, self.norms)

    @property
    def observed(self) -> bool:
        """Tell whether any step of the window had a finite gradient; else Eqs. (3) and (6) are unknown, not zero."""
        return bool(self.seen)

    @torch.no_grad()
    def observe_inputs(self, mean_squares: Sequence[Tensor | None]) -> None:
        """Move the EMA of the input energy on by one optimizer step; a layer keeps its value where it
        saw no input, or an infinite one."""
        indices = [index for index, seen in enumerate(mean_squares) if seen is not None]
        if not indices:
            return
        fresh = [seen for seen in mean_squares if seen is not None]
        widths = [len(seen) for seen in fresh]
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
        gradient = self._by_gradient() if of.alpha > 0 else torch.zeros_like(inputs)
        mixed = iter(mix_scores(gradient, inputs, alpha=of.alpha, norm=of.score_norm).tolist())
        return {layer.name: list(islice(mixed, layer.rank)) for layer in self.layers}

    @torch.no_grad()
    def _by_input(self) -> Tensor:
        by_input = []
        for layer, energy in zip(self.layers, self.energies, strict=True):
            norm = energy.sqrt() if self.settings.input_norm == "rms" else energy
            A, E, B = (factor.detach().float() for factor in layer.factors)
            by_input.append(input_scores(A, E, B, norm))
        return torch.cat(by_input)

    def _by_gradient(self) -> Tensor:
        weights = gradient_weights(self.norms)
        if self.settings.omega == "uniform":  # AdaLoRA's plain sum
            weights = torch.ones_like(weights)
        averages = zip(self._by_factor(self.sensitivity), self._by_factor(self.uncertainty), strict=True)
        importance = (sensitivity * uncertainty for sensitivity, uncertainty in averages)  # of A, E, B, A ... in turn
        triples = zip(importance, importance, importance, weights, strict=False)
        return torch.cat([gradient_scores(A, E, B, weight) for A, E, B, weight in triples])

    def resize(self, replacements: Mapping[str, Sequence[Replacement]]) -> None:
        """Follow a resize that is already installed: kept rows keep their averages, new ones start at zero."""
        self._inputs = None
        for index, layers in enumerate(self._pieces):
            if any(layer.name in replacements for layer in layers):
                for averages in (self.sensitivity, self.uncertainty):
                    averages[index] = _resized(averages[index], layers, replacements)

    def _by_factor(self, averages: Sequence[Tensor]) -> Iterator[Tensor]:
        for layers, flat in zip(self._pieces, averages, strict=True):
            factors = _factors(layers)
            for part, parameter in zip(flat.split([factor.numel() for factor in factors]), factors, strict=True):
                yield part.view(parameter.shape)

    def tensors(self) -> dict[str, Tensor]:
        energies = {f"energy.{layer.name}": energy for layer, energy in zip(self.layers, self.energies, strict=True)}
        return {
            "sensitivity": torch.cat([self.norms.new_zeros(0), *self.sensitivity]),
            "uncertainty": torch.cat([self.norms.new_zeros(0), *self.uncertainty]),
            "norms": self.norms,
            "seen": self.seen,
            "skipped": self.skipped,
            **energies,
        }

    def _load(self, tensors: dict[str, Tensor]) -> None:
        for name, averages in (("sensitivity", self.sensitivity), ("uncertainty", self.uncertainty)):
            averages[:] = [part.clone() for part in tensors[name].split([len(piece) for piece in averages])]
        self.norms, self.seen, self.skipped = tensors["norms"], tensors["seen"], tensors["skipped"]
        self.energies = [tensors[f"energy.{layer.name}"] for layer in self.layers]


def _factors(layers: Sequence[AdaptedLayer]) -> list[Tensor]:
    return [factor for layer in layers for factor in layer.factors]


def _elements(layers: Sequence[AdaptedLayer]) -> int:
    return sum(factor.numel() for factor in _factors(layers))


def _pieces(layers: Sequence[AdaptedLayer]) -> list[list[AdaptedLayer]]:
    """Cut the layers into runs, in order, of `PIECE` elements or one layer more."""
    pieces: list[list[AdaptedLayer]] = [[]]
    size = 0
    for layer in layers:
        if size >= PIECE:
            pieces.append([])
            size = 0
        pieces[-1].append(layer)
        size += _elements([layer])
    return pieces


def _resized(flat: Tensor, layers: Sequence[AdaptedLayer], replacements: Mapping[str, Sequence[Replacement]]) -> Tensor:
    parts, at = [], 0
    for layer, new in zip((layer for layer in layers for _ in range(3)), _factors(layers), strict=True):
        change = next((r for r in replacements.get(layer.name, ()) if r.new is new), None)
        old = new if change is None else change.old
        values = flat[at : at + old.numel()]
        at += old.numel()
        if change is not None:
            values = select_rows(values.view(old.shape), change.dim, change.kept, change.num_new)
        parts.append(values.reshape(-1))
    return torch.cat(parts)

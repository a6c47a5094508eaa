"""Algorithm 1 over several steps: against loops from the paper, and against the scores of PEFT's AdaLoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import same_bits
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator as AdaLoraAllocator
from torch import Tensor, nn
from windows import run_of

from pedyra.allocate.scores import Sensitivity
from pedyra.lora.attach import attach
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.replacement import NewTriples, put_replacements, replacements_of
from pedyra.pe_dyra.config import RankSettings
from pedyra.pe_dyra.triple_scores import TripleScores

BETA1, BETA2 = 0.8, 0.6


@pytest.fixture
def layers(make_net) -> list[AdaptedLayer]:
    layers = attach(make_net(trained=True, r=3))
    with torch.no_grad():
        for layer in layers:
            layer.a.E.uniform_(-2, 2)
    return layers


def made(layers: list[AdaptedLayer], **settings: Any) -> TripleScores:
    return TripleScores(run_of(layers), RankSettings(beta1=BETA1, beta2=BETA2, **settings))


@pytest.fixture
def scores(layers) -> TripleScores:
    return made(layers)


def draw_gradients(layers: list[AdaptedLayer], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for layer in layers:
        for parameter in (layer.a.A, layer.a.E, layer.b.weight):
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def move_weights(layers: list[AdaptedLayer]) -> None:
    with torch.no_grad():
        for layer in layers:
            for parameter in (layer.a.A, layer.a.E, layer.b.weight):
                parameter -= 0.1 * parameter.grad  # type: ignore[operator]


class LiteralAlgorithm1:
    """Element by element in Python floats, as the paper lists it."""

    def __init__(self) -> None:
        self.sensitivity: dict[Any, float] = {}
        self.uncertainty: dict[Any, float] = {}
        self.energy: dict[Any, float] = {}

    def observe(self, layers: list[AdaptedLayer], inputs: list[Tensor]) -> None:
        for n, layer in enumerate(layers):
            for kind, p in (("A", layer.a.A), ("E", layer.a.E), ("B", layer.b.weight)):
                assert p.grad is not None
                for at, (w, g) in enumerate(zip(p.flatten().tolist(), p.grad.flatten().tolist(), strict=True)):
                    key = (n, kind, at)
                    I_bar = BETA1 * self.sensitivity.get(key, 0.0) + (1 - BETA1) * abs(w * g)
                    U_bar = BETA2 * self.uncertainty.get(key, 0.0) + (1 - BETA2) * abs(abs(w * g) - I_bar)
                    self.sensitivity[key], self.uncertainty[key] = I_bar, U_bar
            for j in range(layer.a.in_features):
                square = sum(float(x[j]) ** 2 for x in inputs[n]) / len(inputs[n])
                self.energy[n, j] = BETA1 * self.energy.get((n, j), 0.0) + (1 - BETA1) * square

    def s(self, n: int, kind: str, at: int) -> float:
        return self.sensitivity[n, kind, at] * self.uncertainty[n, kind, at]

    def scores(self, layers: list[AdaptedLayer], alpha: float, power: float) -> dict[str, list[float]]:
        by_gradient: dict[str, list[float]] = {}
        by_input: dict[str, list[float]] = {}
        for n, layer in enumerate(layers):
            r, width, out = layer.rank, layer.a.in_features, layer.b.out_features
            grads = [layer.a.A.grad, layer.a.E.grad, layer.b.weight.grad]
            norms = [sum(g**2 for g in grad.flatten().tolist()) ** 0.5 for grad in grads if grad is not None]
            w_A, w_E, w_B = (norm / sum(norms) for norm in norms)
            A, E, B = layer.a.A.tolist(), layer.a.E.tolist(), layer.b.weight.tolist()
            by_gradient[layer.name], by_input[layer.name] = [], []
            for i in range(r):
                s_A = sum(self.s(n, "A", i * width + k) for k in range(width)) / width
                s_B = sum(self.s(n, "B", k * r + i) for k in range(out)) / out
                by_gradient[layer.name].append(w_A * s_A + w_E * self.s(n, "E", i) + w_B * s_B)
                reach = sum(abs(A[i][k]) * self.energy[n, k] ** power for k in range(width))
                by_input[layer.name].append(abs(E[i]) * reach * sum(B[k][i] ** 2 for k in range(out)) ** 0.5)
        mean_g, mean_i = (_mean([v for values in s.values() for v in values]) for s in (by_gradient, by_input))
        return {
            name: [alpha * g / mean_g + (1 - alpha) * i / mean_i for g, i in zip(by_gradient[name], by_input[name])]  # noqa: B905
            for name in by_gradient
        }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(("input_norm", "power"), [("rms", 0.5), ("mean_square", 1.0)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_algorithm_1_equals_its_loops(alpha, input_norm, power, layers):
    literal, scores = LiteralAlgorithm1(), made(layers, alpha=alpha, input_norm=input_norm)
    for step in range(4):
        draw_gradients(layers, step)
        inputs = [torch.randn(7, layer.a.in_features) for layer in layers]
        scores.observe_gradients()
        scores.observe_inputs([x.square().mean(0) for x in inputs])
        literal.observe(layers, inputs)
        if step < 3:
            move_weights(layers)
    expected = literal.scores(layers, alpha, power)
    ours = scores.triple_scores()
    assert list(ours) == list(expected)
    for name in expected:
        assert ours[name] == pytest.approx(expected[name], rel=1e-4)


class RecordingAdaLora(AdaLoraAllocator):
    """PEFT's own allocator, noting the score of every triple it computes."""

    def _combine_ipt(self, ipt_E: Tensor, ipt_AB: Tensor) -> Tensor:
        score = super()._combine_ipt(ipt_E, ipt_AB)  # type: ignore[misc]
        self.seen = [*getattr(self, "seen", []), score]
        return score


def adalora_twin(layers: list[AdaptedLayer]) -> nn.Module:
    """The same tensors under the names and shapes of PEFT's AdaLoRA."""
    twin = nn.Module()
    for index, layer in enumerate(layers):
        slot = nn.Module()
        for kind, value in (("A", layer.a.A), ("E", layer.a.E[:, None]), ("B", layer.b.weight)):
            slot.register_module(f"lora_{kind}", nn.ParameterDict({"default": nn.Parameter(value.detach().clone())}))
        twin.add_module(f"layer{index}", slot)
    return twin


@pytest.mark.parametrize("kind", [Sensitivity, TripleScores])
def test_plain_sensitivity_and_uniform_omega_at_alpha_one_are_pefts_adalora(kind, layers):
    settings = RankSettings(beta1=BETA1, beta2=BETA2, alpha=1, score_norm="none", omega="uniform")
    scores = kind(run_of(layers), settings)
    twin = adalora_twin(layers)
    config = AdaLoraConfig(init_r=3, target_r=1, beta1=BETA1, beta2=BETA2, total_step=100, tinit=0, tfinal=0, deltaT=1)
    adalora = RecordingAdaLora(twin, config, "default")
    for step in range(5):
        draw_gradients(layers, step)
        theirs = dict(twin.named_parameters())
        for index, layer in enumerate(layers):
            for kind, parameter in (("A", layer.a.A), ("E", layer.a.E), ("B", layer.b.weight)):
                their = theirs[f"layer{index}.lora_{kind}.default"]
                assert parameter.grad is not None
                their.data = parameter.detach().reshape(their.shape).clone()
                their.grad = parameter.grad.reshape(their.shape)
        scores.observe_gradients()
        adalora.update_ipt(twin)
        move_weights(layers)
    adalora.mask_to_budget(twin, budget=5)
    ours = scores.triple_scores()
    for layer, expected in zip(layers, adalora.seen, strict=True):
        assert torch.allclose(torch.tensor(ours[layer.name]), expected, rtol=1e-5, atol=0)
    # And the same four lowest of the nine fall.
    flat = torch.tensor([value for values in ours.values() for value in values])
    fallen = torch.cat([dict(twin.named_parameters())[f"layer{i}.lora_E.default"].flatten() == 0 for i in range(3)])
    assert fallen.nonzero().flatten().tolist() == sorted(flat.argsort()[:4].tolist())


@pytest.mark.parametrize("alpha", [0.5, 0.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_gradient_skips_the_step_for_all_and_is_counted(bad, alpha, layers):
    scores = made(layers, alpha=alpha)
    draw_gradients(layers, 0)
    scores.observe_gradients()
    before = {name: value.clone() for name, value in scores.tensors().items()}
    draw_gradients(layers, 1)
    layers[1].b.weight.grad[0, 0] = bad  # type: ignore[index]
    scores.observe_gradients()
    assert int(scores.skipped) == 1 and torch.count_nonzero(scores.norms) > 0
    after = scores.tensors()
    assert all(same_bits(after[name], before[name]) for name in before if name != "skipped")


def test_a_missing_gradient_counts_as_zero(layers, scores):
    draw_gradients(layers, 0)
    layers[0].a.A.grad = None
    layers[2].b.weight.grad = None
    scores.observe_gradients()
    A, E, B = list(scores._by_factor(scores.sensitivity))[:3]
    assert torch.count_nonzero(A) == 0 and torch.count_nonzero(E) == 3 and torch.count_nonzero(B) > 0
    assert int(scores.skipped) == 0 and float(scores.norms[0, 0]) == 0.0


def test_inputs_that_are_missing_or_not_finite_keep_the_old_energy(layers, scores):
    scores.observe_inputs([torch.ones(layer.a.in_features) for layer in layers])
    before = [energy.clone() for energy in scores.energies]
    scores.observe_inputs([None, torch.full((12,), float("nan")), torch.ones(6)])
    assert same_bits(scores.energies[0], before[0]) and same_bits(scores.energies[1], before[1])
    assert torch.allclose(scores.energies[2], BETA1 * before[2] + (1 - BETA1))


def test_without_gradients_alpha_0_scores_the_same_and_keeps_nothing_of_the_parameters_size(layers, scores):
    without = made(layers, alpha=0)
    for step in range(3):
        draw_gradients(layers, step)
        energies = [torch.rand(layer.a.in_features) for layer in layers]
        for state in (scores, without):
            state.observe_gradients()
            state.observe_inputs([energy.clone() for energy in energies])
    scores.settings = without.settings
    assert without.triple_scores() == scores.triple_scores()
    assert same_bits(without.norms, scores.norms)  # of Eq. (5), for the report
    assert max(value.numel() for value in without.tensors().values()) == max(layer.a.in_features for layer in layers)


def test_half_precision_triples_are_averaged_in_float32(make_net):
    layers = attach(make_net(trained=True, r=2, dtype=torch.bfloat16))
    scores = made(layers)
    for layer in layers:
        for p in (layer.a.A, layer.a.E, layer.b.weight):
            p.grad = torch.full_like(p, 1e-20)
    scores.observe_gradients()
    assert scores.sensitivity.dtype == torch.float32 and bool((scores.sensitivity > 0).all())


def test_after_a_resize_kept_triples_keep_their_averages_and_new_ones_start_at_zero(layers):
    scores = made(layers, alpha=1)
    draw_gradients(layers, 0)
    scores.observe_gradients()
    before = [part.clone() for part in scores._by_factor(scores.sensitivity)]
    new = NewTriples(torch.randn(2, 12), torch.ones(2), torch.zeros(6, 2))
    changes = {"layers.0": replacements_of(layers[0], (1,), None), "layers.1": replacements_of(layers[1], (0, 2), new)}
    for layer in layers[:2]:
        put_replacements([(layer, changes[layer.name])])
    scores.resize(changes)
    after = list(scores._by_factor(scores.sensitivity))
    zeros: Callable[..., Tensor] = torch.zeros
    expected = [
        *(before[0][[0, 2]], before[1][[0, 2]], before[2][:, [0, 2]]),
        torch.cat([before[3][[1]], zeros(2, 12)]),
        torch.cat([before[4][[1]], zeros(2)]),
        torch.cat([before[5][:, [1]], zeros(6, 2)], 1),
        *before[6:],
    ]
    assert len(after) == len(expected) and all(same_bits(a, b) for a, b in zip(after, expected, strict=True))
    by_layer = scores.triple_scores()
    assert {name: len(values) for name, values in by_layer.items()} == {"layers.0": 2, "layers.1": 3, "layers.2": 3}
    assert by_layer["layers.1"][1:] == [0.0, 0.0]


def test_the_state_survives_a_checkpoint(layers, scores):
    draw_gradients(layers, 0)
    scores.observe_gradients()
    scores.observe_inputs([torch.rand(layer.a.in_features) for layer in layers])
    other = made(layers)
    other.load_tensors({name: value.clone() for name, value in scores.tensors().items()})
    assert all(same_bits(value, other.tensors()[name]) for name, value in scores.tensors().items())

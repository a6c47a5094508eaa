"""Gradient directions from probes, against the dense gradient's own singular pairs."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from pedyra.lora.attach import attach
from pedyra.lora.layer import AdaptedLayer
from pedyra.methods.pedyra import gradient_sketch
from pedyra.methods.pedyra.gradient_sketch import GradientSketch


def two_layers(seed: int = 0) -> tuple[nn.Module, list[AdaptedLayer]]:
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"]))  # type: ignore[arg-type]
    return model, attach(model)


def best(sketch: GradientSketch) -> dict[str, list[float]]:
    """Per layer what its candidates save beyond two standard errors."""
    return {name: [gain.saves(1.0, 2.0) for gain in gains] for name, gains in sketch.candidates(2.0).items()}


def dense_gradients(model: nn.Module, layers: list[AdaptedLayer], x: torch.Tensor) -> list[torch.Tensor]:
    """dL/dW of the base weights, the slow way."""
    weights = [layer.module.base_layer.weight.requires_grad_() for layer in layers]
    return list(torch.autograd.grad(model(x).square().mean(), weights))


def test_probes_leave_the_output_bit_equal_and_add_no_parameter():
    model, layers = two_layers()
    x = torch.randn(5, 12)
    before, parameters = model(x), [id(p) for p in model.parameters()]
    sketch = GradientSketch(layers, q=3, steps=6, generator=torch.Generator().manual_seed(0))
    for _ in range(6):
        assert torch.equal(model(x), before)
        model(x).square().mean().backward()
        sketch.observe()
    assert [id(p) for p in model.parameters()] == parameters
    assert all("probe" not in key for key in model.state_dict())


def test_full_width_sketch_finds_the_singular_values_and_pairs_of_the_dense_gradient():
    model, layers = two_layers()
    x = torch.randn(64, 12)
    sketch = GradientSketch(layers, q=8, steps=9, generator=torch.Generator().manual_seed(0))
    for _ in range(9):
        model(x).square().mean().backward()
        sketch.observe()
    gains = sketch.gains()
    for layer, (mean, error), dense in zip(layers, gains, dense_gradients(model, layers, x), strict=True):
        U, S, Vh = torch.linalg.svd(dense)
        torch.testing.assert_close(mean[:3], S[:3], rtol=2e-2, atol=1e-6)
        assert error.max() < 1e-3 * S[0]  # the same batch at every step: no noise
        u, v = sketch.directions(layer, 2.0)
        assert abs(u[0] @ U[:, 0]) > 0.98 and abs(v[0] @ Vh[0]) > 0.98


def test_sketches_of_micro_batches_add_up_to_that_of_the_whole_batch():
    x = torch.randn(16, 12)
    found = []
    for parts in (1, 4):
        model, layers = two_layers()
        sketch = GradientSketch(layers, q=2, steps=6, generator=torch.Generator().manual_seed(0))
        for _ in range(6):
            for part in x.chunk(parts):
                (model(part).square().mean() / parts).backward()
            sketch.observe()
        found.append(best(sketch))
    for name in found[0]:
        torch.testing.assert_close(torch.tensor(found[0][name]), torch.tensor(found[1][name]), rtol=1e-3, atol=1e-6)


def test_a_gain_that_is_only_noise_is_not_positive():
    torch.manual_seed(0)
    model, layers = two_layers()
    sketch = GradientSketch(layers, q=2, steps=60, generator=torch.Generator().manual_seed(0))
    for _ in range(60):  # the loss gradient is white noise: no direction lasts from one step to the next
        (model(torch.randn(4, 12)) * torch.randn(4, 8)).sum().backward()
        sketch.observe()
    assert sum(gain > 0 for gains in best(sketch).values() for gain in gains) <= 1


def test_a_trial_measures_the_slope_at_a_contribution_of_zero():
    model, layers = two_layers()
    with torch.no_grad():
        for layer in layers:
            layer.b.weight.copy_(torch.randn_like(layer.b.weight))
    x = torch.randn(16, 12)
    whole = model(x)
    sketch = GradientSketch(layers, q=2, steps=6, generator=torch.Generator().manual_seed(0))
    for _ in range(6):
        model(x).square().mean().backward()
        sketch.observe()
        if sketch.judges:
            sketch.put_on_trial({layers[0].name: (1,)})
    off = model(x)
    measured = sketch.trials()
    sketch.remove()
    assert torch.equal(model(x), whole)
    with torch.no_grad():
        layers[0].a.E[1] = 0  # the slow way: the model without the triple, and the gradient of its dense weight
    torch.testing.assert_close(model(x), off)
    G = dense_gradients(model, layers, x)[0]
    a, b = layers[0].a.A[1].detach(), layers[0].b.weight[:, 1].detach()
    expected = float(-(b / b.norm()) @ G @ (a / a.norm()))
    assert measured[layers[0].name][1].mean == pytest.approx(expected, rel=1e-4)
    length = layers[0].scaling * float(torch.outer(b, a).norm())
    assert measured[layers[0].name][1].length == pytest.approx(length, rel=1e-5)
    assert measured[layers[1].name] == {}


def test_state_saved_in_mid_window_continues_to_the_same_gains():
    for cut in (1, 3, 5):
        model, layers = two_layers()
        sketch = GradientSketch(layers, q=2, steps=6, generator=torch.Generator().manual_seed(0))
        for step in range(6):
            if step == cut:
                saved = {name: value.clone() for name, value in sketch.tensors().items()}
                sketch.remove()
                sketch = GradientSketch(layers, q=2, steps=6, generator=torch.Generator().manual_seed(0))
                sketch.load_tensors(saved)
            x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            sketch.observe()
        if cut == 1:
            expected = sketch.candidates(2.0)  # with the energy of each
        assert sketch.candidates(2.0) == expected


def test_what_pays_for_a_new_triple_is_what_it_begins_along(monkeypatch):
    _, layers = two_layers()
    sketch = GradientSketch(layers, q=2, steps=6, generator=torch.Generator().manual_seed(0))
    sketch.left = [torch.eye(layer.b.out_features)[:, :2] for layer in layers]
    sketch.right = [torch.eye(layer.a.in_features)[:2] for layer in layers]
    # Less one error the first is worth more, less three only the second is worth anything.
    measured = torch.tensor([10.0, 6.0]).repeat(len(layers)), torch.tensor([4.5, 1.5]).repeat(len(layers))
    sketch._measure_with(sketch.right)
    sketch.energy = torch.ones(3 * len(layers))
    monkeypatch.setattr(gradient_sketch, "means_and_errors", lambda *_: measured)
    assert [gain.mean for gain in sketch.candidates(1.0)[layers[0].name]] == [10.0, 6.0]
    assert [gain.mean for gain in sketch.candidates(3.0)[layers[0].name]] == [6.0, 10.0]
    assert torch.equal(sketch.directions(layers[0], 3.0)[1][0], torch.eye(12)[1])
    # The first is 2.2 errors long, the second 4: beyond 3 errors a plan takes the second alone.
    assert [gain.mean for gain in sketch.candidates(1.0, least=3.0)[layers[0].name]] == [6.0, 10.0]
    assert torch.equal(sketch.directions(layers[0], 1.0, least=3.0)[1][0], torch.eye(12)[1])


def test_directions_are_ordered_by_what_they_save_not_by_their_slope(monkeypatch):
    _, layers = two_layers()
    sketch = GradientSketch(layers, q=2, steps=6, generator=torch.Generator().manual_seed(0))
    measured = torch.tensor([10.0, 6.0]).repeat(len(layers)), torch.zeros(2 * len(layers))
    monkeypatch.setattr(gradient_sketch, "means_and_errors", lambda *_: measured)
    sketch.right = [torch.eye(layer.a.in_features)[:2] for layer in layers]
    sketch._measure_with(sketch.right)
    sketch.energy = torch.tensor([90.0, 18.0, 9.0] * len(layers))  # 10^2 / 10 against 6^2 / 2
    assert [(gain.mean, gain.energy) for gain in sketch.candidates(1.0)[layers[0].name]] == [(6.0, 2.0), (10.0, 10.0)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_energy_is_the_mean_square_of_the_inputs_along_each_direction(checkpointing):
    model, layers = two_layers()
    sketch = GradientSketch(layers, q=2, steps=6, generator=torch.Generator().manual_seed(0))
    seen = []
    for step in range(6):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        y = checkpoint(model, x, use_reentrant=False) if checkpointing else model(x)
        y.square().mean().backward()
        sketch.observe()
        if step >= 4:
            seen.append(x)
            with torch.no_grad():
                model.eval()(100 * x)  # evaluation is not counted
            model.train()
    found, x = sketch.candidates(2.0), torch.cat(seen)
    with torch.no_grad():
        inputs = [x, torch.tanh(layers[0].module.eval()(x))]
    for layer, right, into in zip(layers, sketch.right, inputs, strict=True):
        expected = (into @ right.T).square().mean(0)
        assert sorted(g.energy for g in found[layer.name]) == pytest.approx(sorted(expected.tolist()), rel=1e-5)


def test_energy_under_dora_does_not_count_the_identity_that_peft_hands_in():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))
    model = get_peft_model(base, LoraConfig(r=2, use_dora=True, target_modules=["0", "2"]))  # type: ignore[arg-type]
    layers = attach(model)
    sketch = GradientSketch(layers, q=2, steps=6, generator=torch.Generator().manual_seed(0))
    x = torch.randn(16, 12)
    for _ in range(6):
        model(x).square().mean().backward()
        sketch.observe()
    expected = (x @ sketch.right[0].T).square().mean(0).tolist()
    assert sorted(g.energy for g in sketch.candidates(2.0)[layers[0].name]) == pytest.approx(sorted(expected))


def test_the_scale_of_the_loss_is_taken_off_the_gains():
    x = torch.randn(16, 12)
    found = []
    for scale in (1.0, 1024.0):
        model, layers = two_layers()
        sketch = GradientSketch(layers, q=2, steps=6, generator=torch.Generator().manual_seed(0))
        for _ in range(6):
            (scale * model(x).square().mean()).backward()
            sketch.observe(scale)
        found.append(best(sketch))
    for name in found[0]:
        torch.testing.assert_close(torch.tensor(found[0][name]), torch.tensor(found[1][name]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bad_step", [1, 4])
def test_a_layer_that_overflows_in_a_step_has_no_gradient_there_and_the_others_do(bad_step):
    found = []
    for bad in (float("inf"), 0.0):
        model, layers = two_layers()
        sketch = GradientSketch(layers, q=2, steps=6, generator=torch.Generator().manual_seed(0))
        for step in range(6):
            model(torch.randn(16, 12, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            if step == bad_step:
                for probe in (layers[0].a.probe, layers[0].b.probe):
                    if probe is not None and probe.grad is not None:
                        probe.grad.mul_(0.0)
                        probe.grad[0, 0] = bad
            sketch.observe()
        found.append([torch.stack(pair) for pair in sketch.gains()])
    for overflowed, without in zip(*found, strict=True):
        assert torch.equal(overflowed, without) and overflowed.isfinite().all()
    assert found[0][1][0].abs().max() > 0


def test_inputs_that_overflow_in_a_step_leave_the_energy_of_the_others():
    """Only the second layer overflows in the step, by its own base weight, so the first one's sums still count."""
    model, layers = two_layers()
    sketch = GradientSketch(layers, q=2, steps=9, generator=torch.Generator().manual_seed(0))
    seen: list[list[torch.Tensor]] = [[], []]
    for step in range(9):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        bad = step == 7
        handle = layers[1].module.register_forward_pre_hook(lambda _, args: (args[0] * float("inf"),)) if bad else None
        model(x).square().mean().backward()
        sketch.observe()
        if handle is not None:
            handle.remove()
        if step >= 6:
            seen[0].append(x)
        if step >= 6 and not bad:
            with torch.no_grad():
                seen[1].append(torch.tanh(layers[0].module.eval()(x)))
            model.train()
    found = sketch.candidates(2.0)
    for layer, right, inputs in zip(layers, sketch.right, seen, strict=True):
        expected = (torch.cat(inputs) @ right.T).square().mean(0)
        assert sorted(g.energy for g in found[layer.name]) == pytest.approx(sorted(expected.tolist()), rel=1e-5)


def test_energy_is_a_mean_over_the_tokens_that_a_layer_sees():
    """The second layer sees the first of every four tokens, as a pooler does."""
    torch.manual_seed(0)
    first, second = nn.Linear(12, 10), nn.Linear(10, 8)
    model = get_peft_model(nn.ModuleDict({"0": first, "2": second}), LoraConfig(r=2, target_modules=["0", "2"]))  # type: ignore[arg-type]
    layers = attach(model)
    sketch = GradientSketch(layers, q=2, steps=6, generator=torch.Generator().manual_seed(0))
    x = torch.randn(16, 12)
    for _ in range(6):
        pooled = torch.tanh(layers[0].module(x))[::4]
        layers[1].module(pooled).square().mean().backward()
        sketch.observe()
    for layer, right, into in zip(layers, sketch.right, (x, pooled.detach()), strict=True):
        expected = (into @ right.T).square().mean(0)
        found = sketch.candidates(2.0)[layer.name]
        assert sorted(g.energy for g in found) == pytest.approx(sorted(expected.tolist()), rel=1e-5)

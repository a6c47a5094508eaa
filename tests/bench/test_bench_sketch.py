"""`pedyra bench sketch`: its dense gradients are right, its figures mean what they say, both carriers agree."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from pedyra.bench.bench_models import bench_model
from pedyra.bench.bench_sketch import bench_sketch, dense_gradients, largest_angle, prepare, sketch_of
from pedyra.bench.sketch_carriers import HookCarrier, _probes
from pedyra.cli import app


@pytest.fixture(scope="module")
def tiny():
    return prepare(bench_model("llama-32x1").with_batch(2, 8))


def test_angles_are_those_of_geometry():
    e = torch.eye(4)
    turned = torch.stack([e[0], math.cos(math.radians(30)) * e[1] + math.sin(math.radians(30)) * e[2]])
    assert largest_angle(e[:2], turned) == pytest.approx(30, abs=1e-4)
    assert largest_angle(e[:2], turned.flip(0)) == pytest.approx(30, abs=1e-4)
    assert largest_angle(e[:1], e[3:]) == pytest.approx(90) and largest_angle(e[:2], e[:2]) == pytest.approx(
        0, abs=1e-4
    )


def test_the_dense_gradient_predicts_the_change_of_the_loss(tiny):
    model, layers, source = tiny
    batches = [source(0), source(1)]
    gradient = dense_gradients(model, layers, [batches, batches])[0]  # the mean of two equal steps is one step
    weight = layers[0].module.get_base_layer().weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))

    def loss() -> float:
        with torch.no_grad():
            return sum(float(model(**batch).loss.double()) for batch in batches)

    losses = []
    for sign in (1, -2):
        weight.data += sign * 1e-2 * direction
        losses.append(loss())
    weight.data += 1e-2 * direction
    assert float((gradient * direction).sum()) == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=0.02, abs=1e-4)


def test_a_sketch_as_wide_as_the_gradient_is_exact(tiny):
    model, layers, source = tiny
    steps = [[source(0)]] * 4
    dense = dense_gradients(model, layers, steps)
    sketch = sketch_of(model, layers, steps, size=32)
    for layer, gradient in zip(layers, dense, strict=True):
        slopes = sorted((gain.mean for gain in sketch.candidates(1.0)[layer.name]), reverse=True)
        found = torch.tensor(slopes[:2])
        torch.testing.assert_close(found, torch.linalg.svdvals(gradient)[:2], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("part", ["range", "co-range"])
def test_hooks_and_probes_give_the_same_products_and_the_dense_gradients(tiny, part):
    model, layers, source = tiny
    batches = [source(0), source(1)]
    gradients = dense_gradients(model, layers, [batches])
    torch.manual_seed(0)
    _, remove_probes = _probes(layers, 3, part)
    fixed = [layer.a.probe if part == "range" else layer.b.probe for layer in layers]
    hooks = HookCarrier(layers, fixed, part)
    for batch in batches:
        model(**batch).loss.backward()
    for i, (layer, gradient) in enumerate(zip(layers, gradients, strict=True)):
        probe = layer.b.probe if part == "range" else layer.a.probe
        expected = gradient @ fixed[i].T if part == "range" else fixed[i].T @ gradient
        torch.testing.assert_close(probe.grad / layer.scaling, expected, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(hooks.sums[i], expected, rtol=1e-3, atol=1e-6)
    hooks.remove()
    remove_probes()
    model.zero_grad()


def test_smoke_writes_both_kinds_of_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    result = CliRunner().invoke(app, ["bench", "sketch", "--smoke", "--json", str(file)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    accuracy = [row for row in rows if row["kind"] == "accuracy"]
    assert [(row["batches"], row["steps"], row["size"]) for row in accuracy] == [
        ("same", 4, 2), ("same", 4, 8), ("own", 4, 2), ("own", 4, 8),
    ]  # fmt: skip
    small, large = accuracy[:2]
    assert small["captured"] < large["captured"] <= 1.0001 and large["angle"] < small["angle"]
    for row in accuracy:
        assert 0 <= row["angle"] <= row["angle_worst"] <= 90.001 and row["captured_worst"] <= row["captured"]
    carriers = [row for row in rows if row["kind"] == "carrier"]
    assert {(row["part"], row["size"], row["carrier"]) for row in carriers} == {
        (part, size, name) for part in ("range", "co-range") for size in (2, 8) for name in ("probes", "hooks")
    }
    assert all(row["extra_bytes"] > 0 for row in carriers)


def test_a_window_without_three_parts_is_refused():
    with pytest.raises(ValueError, match="window 2 is too short"):
        next(bench_sketch("llama-32x1", windows=[2]))

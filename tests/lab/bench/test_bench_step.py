"""`pedyra bench step`: its rows, and the arithmetic between what it times and what it reports. No time is asserted."""

from __future__ import annotations

import json
from time import perf_counter

import pytest
import torch
from typer.testing import CliRunner

from pedyra import PeDyra
from pedyra.lab.bench.bench_models import bench_model
from pedyra.lab.bench.bench_step import (
    COLUMNS,
    _by_kind,
    bench_step,
    measure,
    measured,
    observed_steps,
    over_a_run,
)
from pedyra.lab.bench.bench_variants import VARIANTS, Setting, build
from pedyra.lab.bench.masked_reference import MaskedReference
from pedyra.lab.bench.memory import peak_bytes, storage_bytes
from pedyra.lab.cli import app


def test_smoke_writes_a_row_for_every_model_and_variant(tmp_path):
    file = tmp_path / "rows.jsonl"
    result = CliRunner().invoke(app, ["bench", "step", "--smoke", "--threads", "1", "--json", str(file)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["model"], row["variant"]) for row in rows] == [
        (model, variant) for model in ("llama-32x1", "deberta-32x1") for variant in VARIANTS
    ]
    assert all(set(COLUMNS) <= row.keys() for row in rows)
    assert "quartiles" in result.output and "observed" in result.output  # the spread, and the steps by kind
    for row in rows:
        assert row["variant"] != "lora" or row["ratio_to_lora"] == 1
        assert row["variant"] != "floor" or row["ratio_to_floor"] == 1
        is_ours = row["variant"].startswith("pedyra")
        assert (row["adjustment_seconds"] is None) == (row["variant"] != "direct" and not is_ours)
        assert ("ratio_by_kind" in row) == is_ours
        assert row["peak_bytes"] > 4 * row["trainable_parameters"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(models=["llama-33x2"]), "width that is a multiple of 32"),
        (dict(models=["llama-0x1"]), "multiple of 32"),
        (dict(models=["llama-32x0"]), "a depth of at least 1"),
        (dict(models=["llama-32x1"], variants=["lore"]), "choose from floor, lora"),
        (dict(models=["llama-32x1"], rounds=1), "at least 8"),
        (dict(models=["llama-32x1"], run_steps=2), "no rank could ever move"),
        (dict(models=["llama-32x1"], dtype="int8"), "choose float32 or bfloat16"),
    ],
)
def test_mistakes_are_told_with_the_repair(arguments, message):
    with pytest.raises(ValueError, match=message):
        list(bench_step(**arguments))


def test_an_unknown_model_is_told_before_another_is_timed():
    with pytest.raises(ValueError, match="'nosuch' is unknown"):
        next(bench_step(["llama-32x1", "nosuch"], rounds=10, batch=2, length=16))


@pytest.mark.parametrize("option", ["--rank", "--batch", "--length", "--run-steps"])
def test_sizes_of_nothing_are_refused(option):
    result = CliRunner().invoke(app, ["bench", "step", "--smoke", option, "0"])
    assert result.exit_code == 2 and f"'{option}'" in result.output


def test_the_ratio_of_a_run_weighs_its_steps_and_adds_its_adjustments():
    schedule = PeDyra(interval=100, initial_warmup=400, final_warmup=350).method().schedule(1000)
    assert schedule.adjustments == (500, 600)  # 700 is not before 1000 - 350
    observed = 103 + 100  # what an EMA of 0.85 still remembers at 500; then all that comes before 600
    assert observed_steps(schedule, 103) == observed
    expected = (observed * 1.5 + (1000 - observed) * 1.0 + 2 * 3.0) / 1000
    assert over_a_run(1.5, 1.0, 3.0, schedule) == pytest.approx(expected)


def test_half_of_the_timed_steps_are_observed():
    setting = Setting(model=bench_model("llama-32x1").with_batch(2, 8), config=measured(10), total_steps=23)
    built = {"pedyra": build("pedyra", setting, perf_counter)}
    seconds, adjustments, _ = measure(built, setting, perf_counter)
    assert built["pedyra"].observed == [True] * 10 + [False] * 10
    assert len(seconds["pedyra"]) == 20 and len(adjustments["pedyra"]) == 5  # after steps 5, 7, 9, 11 and 13


def test_the_floor_trains_no_adapter_but_sends_gradients_through_the_model():
    model = bench_model("llama-32x1").with_batch(2, 8)
    setting = Setting(model=model, config=measured(10), total_steps=23)
    floor = build("floor", setting, lambda: 0.0)
    assert floor.trainable() == []
    seen: list[torch.Tensor] = []
    floor.model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    floor.step(setting.tensors(), lambda: 0.0)
    assert seen[0].requires_grad


def test_peak_memory_counts_every_storage_once():
    setting = Setting(model=bench_model("llama-32x1").with_batch(2, 8), config=measured(10), total_steps=23)
    variant = build("lora", setting, lambda: 0.0)
    batch = setting.tensors()
    variant.step(batch, lambda: 0.0)
    parameters = sum(p.numel() for p in variant.model.parameters()) * 4
    trained = sum(p.numel() for p in variant.trainable()) * 4
    least = parameters + 3 * trained  # gradients and two moments
    assert least < peak_bytes(variant, batch, "cpu") < 3 * least
    x = torch.zeros(10)
    assert storage_bytes([x, x[2:], x.view(2, 5)]) == 40


def test_the_masked_reference_conserves_the_number_of_open_triples():
    setting = Setting(
        model=bench_model("llama-32x1").with_batch(2, 8),
        rank=4,
        config=measured(10),
        total_steps=23,
    )
    variant = build("direct", setting, lambda: 0.0)
    reference = variant.after_step.__self__  # type: ignore[attr-defined]
    assert isinstance(reference, MaskedReference)
    batch = setting.tensors()
    before = {name: mask.clone() for name, mask in reference.masks.items()}
    adjusted = [variant.step(batch, lambda: 0.0)[1] is not None for _ in range(20)]
    assert adjusted == [False, True] * 10
    assert sum(int(mask.sum()) for mask in reference.masks.values()) == 4 * len(before)
    for name, layer in reference.layers.items():
        assert torch.all(layer.lora_E["default"][~reference.masks[name]] == 0)


def test_an_unknown_device_is_told():
    result = CliRunner().invoke(app, ["bench", "step", "--smoke", "--device", "foo"])
    assert isinstance(result.exception, ValueError) and "device 'foo' is unknown" in str(result.exception)


def test_the_ratio_of_a_kind_is_the_median_of_its_steps():
    observed = [True, False, True, False, True]
    assert _by_kind(observed, [1.0, 5.0, 3.0, 7.0, 2.0]) == {"observed": 2.0, "idle": 6.0}

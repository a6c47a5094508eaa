"""`pedyra bench step`: its rows, and the arithmetic between what it times and what it reports. No time is asserted."""

from __future__ import annotations

import json
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from pedyra.bench.bench_models import bench_model
from pedyra.bench.bench_step import (
    COLUMNS,
    _by_kind,
    bench_step,
    measured,
    over_a_run,
    settled_after,
    step_kind,
)
from pedyra.bench.bench_variants import VARIANTS, Setting, build
from pedyra.bench.masked_reference import MaskedReference
from pedyra.bench.memory import peak_bytes, storage_bytes
from pedyra.cli import app
from pedyra.config import RankConfig
from pedyra.methods.pedyra.settings import Settings
from pedyra.methods.pedyra.sketching import schedule_of


def test_smoke_writes_a_row_for_every_model_and_variant(tmp_path):
    file = tmp_path / "rows.jsonl"
    result = CliRunner().invoke(app, ["bench", "step", "--smoke", "--threads", "1", "--json", str(file)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["model"], row["variant"]) for row in rows] == [
        (model, variant) for model in ("llama-32x1", "deberta-32x1") for variant in VARIANTS
    ]
    assert all(set(COLUMNS) <= row.keys() for row in rows)
    assert "quartiles" in result.output and "directions" in result.output  # the spread, and the steps by kind
    for row in rows:
        assert row["variant"] != "lora" or row["ratio_to_lora"] == 1
        assert row["variant"] != "floor" or row["ratio_to_floor"] == 1
        assert (row["adjustment_seconds"] is None) == (row["variant"] not in ("paper", "pedyra", "pedyra-fused"))
        assert row["peak_bytes"] > 4 * row["trainable_parameters"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(models=["llama-33x2"]), "width that is a multiple of 32"),
        (dict(models=["llama-0x1"]), "multiple of 32"),
        (dict(models=["llama-32x0"]), "a depth of at least 1"),
        (dict(models=["llama-32x1"], variants=["lore"]), "choose from floor, lora"),
        (dict(models=["llama-32x1"], rounds=1), "at least 5"),
        (dict(models=["llama-32x1"], dtype="int8"), "choose float32 or bfloat16"),
    ],
)
def test_mistakes_are_told_with_the_repair(arguments, message):
    with pytest.raises(ValueError, match=message):
        list(bench_step(**arguments))


def test_an_unknown_model_is_told_before_another_is_timed():
    with pytest.raises(ValueError, match="'nosuch' is unknown"):
        next(bench_step(["llama-32x1", "nosuch"], rounds=5, batch=2, length=16))


@pytest.mark.parametrize("option", ["--rank", "--batch", "--length", "--run-steps"])
def test_sizes_of_nothing_are_refused(option):
    result = CliRunner().invoke(app, ["bench", "step", "--smoke", option, "0"])
    assert result.exit_code == 2 and f"'{option}'" in result.output


def test_kinds_of_steps_follow_the_schedule():
    schedule = schedule_of(RankConfig(interval=200, initial_warmup=100, final_warmup=300), 1000)
    kinds = [step_kind(step, schedule, Settings(sketch_steps=21)) for step in range(1, 1001)]
    assert schedule.adjustments == (300, 500)
    a_sketch = [*["sketched"] * 6, "directions"] * 2 + ["judged"] * 7
    assert kinds[279:300] == kinds[479:500] == a_sketch and kinds.count("idle") == 1000 - 2 * 21


def test_a_run_in_which_nothing_moves_settles_by_the_fourth_adjustment_from_the_deal_on():
    schedule = schedule_of(RankConfig(), 1000)  # adjustments after 50, 100 (the reassignment's), 150, 200, 250 ...
    assert schedule.adjustments[:3] == (50, 100, 150)
    assert settled_after(schedule, Settings()) == 250
    assert settled_after(schedule, Settings(reassignment=0)) == 200
    assert settled_after(schedule, Settings(patience=0)) == 1000


def test_the_ratio_of_a_run_weighs_its_steps_and_adds_its_adjustments():
    schedule, config = schedule_of(RankConfig(interval=10, final_warmup=80), 100), Settings(sketch_steps=7)
    assert schedule.adjustments == (10,)  # 20 is not before 100 - 80
    ratios = {"idle": 1.0, "moved": 1.5, "sketched": 5.0, "directions": 40.0, "judged": 7.0}
    observed = 3 * 1.0 + (5 + 40) * 2 + 3 * 7 + 3
    assert over_a_run(ratios, 3.0, schedule, config, 100, moves=True) == pytest.approx((90 * 1.5 + observed) / 100)
    assert over_a_run(ratios, 3.0, schedule, config, 100, moves=False) == pytest.approx((90 * 1 + observed) / 100)
    settled = over_a_run(ratios, 3.0, schedule, config, 5, moves=False)
    assert settled == pytest.approx((95 * 1 + 3 * 1 + 5 + 40) / 100)


def test_half_of_the_measured_steps_are_observed():
    setting = measured(RankConfig(), Settings(), rounds=10)
    schedule = schedule_of(setting["config"], 3 + 20)
    kinds = [step_kind(step, schedule, setting["settings"]) for step in range(4, 24)]
    observed = ["idle", "directions", "directions", "judged", "judged"] * 2
    assert kinds == ["idle"] * 5 + observed + ["idle"] * 5
    assert len(schedule.adjustments) == 2


def test_the_floor_trains_no_adapter_but_sends_gradients_through_the_model():
    model = bench_model("llama-32x1").with_batch(2, 8)
    setting = Setting(model=model, **measured(RankConfig(), Settings(), 5), total_steps=13)
    floor = build("floor", setting, lambda: 0.0)
    assert floor.trainable() == []
    seen: list[torch.Tensor] = []
    floor.model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    floor.step(setting.tensors(), lambda: 0.0)
    assert seen[0].requires_grad


def test_peak_memory_counts_every_storage_once():
    setting = Setting(
        model=bench_model("llama-32x1").with_batch(2, 8), **measured(RankConfig(), Settings(), 5), total_steps=13
    )
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
        **measured(RankConfig(), Settings(), 10),
        total_steps=23,
    )
    variant = build("paper", setting, lambda: 0.0)
    reference = variant.after_step.__self__  # type: ignore[attr-defined]
    assert isinstance(reference, MaskedReference)
    batch = setting.tensors()
    before = {name: mask.clone() for name, mask in reference.masks.items()}
    adjusted = [variant.step(batch, lambda: 0.0)[1] is not None for _ in range(10)]
    assert adjusted == [False, False, False, False, True] * 2
    assert sum(int(mask.sum()) for mask in reference.masks.values()) == 4 * len(before)
    for name, layer in reference.layers.items():
        assert torch.all(layer.lora_E["default"][~reference.masks[name]] == 0)


def test_an_unknown_device_is_told():
    result = CliRunner().invoke(app, ["bench", "step", "--smoke", "--device", "foo"])
    assert isinstance(result.exception, ValueError) and "device 'foo' is unknown" in str(result.exception)


def test_kinds_are_told_apart_by_what_was_measured():
    """Seconds are the step's number, so that a kind's ratio says which steps it was made of."""
    setting = measured(RankConfig(), Settings(), rounds=16)
    schedule = schedule_of(
        setting["config"], 3 + 32
    )  # idle 8, twice an interval of 8 with a sketch of 2, 2 and 3 steps, idle 8
    by_kind = _by_kind(
        SimpleNamespace(schedule=schedule, run=SimpleNamespace(settings=setting["settings"])),
        [float(step) for step in range(1, 33)],
    )
    idle, sketched, directions = [*range(1, 10), 17], [10, 12, 18, 20], [11, 13, 19, 21]
    judged, moved = [14, 15, 16, 22, 23, 24], range(25, 33)
    kinds = {"idle": idle, "sketched": sketched, "directions": directions, "judged": judged, "moved": moved}
    assert by_kind == {kind: median(steps) for kind, steps in kinds.items()}

"""`benchmarks.step`: its rows, and the arithmetic between what it times and what it reports. No time is asserted."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks.models import bench_model
from benchmarks.spec import parse_method
from benchmarks.step import (
    FLOOR,
    Timing,
    Variant,
    bench_step,
    build,
    measure,
    over_a_run,
    peak_bytes,
    quartiles_by_kind,
    run_schedule,
    step,
    storages,
)

SHORT = Timing(rounds=8, batch=2, length=8)


def built(text: str) -> tuple[Variant, dict[str, torch.Tensor]]:
    """A method on a tiny Llama, and a batch."""
    model = bench_model("llama-32x1").with_batch(SHORT.batch, SHORT.length)
    return build(None if text == FLOOR else parse_method(text), model, SHORT), model.example()


def test_smoke_writes_a_row_for_every_model_and_method_that_is_named(tmp_path, call):
    file, methods = tmp_path / "rows.jsonl", ["floor", "lora", "adalora", "pedyra:alpha=1.0"]
    arguments = ["llama-64x1", "llama-32x1", "--smoke", "--threads", "1", "--json", str(file)]
    named = [part for method in methods for part in ("--method", method)]
    assert call(step, *arguments, *named)[0] == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["model"], row["variant"]) for row in rows] == [
        (model, method) for model in ("llama-64x1", "llama-32x1") for method in methods
    ]
    names = {"ratio_to_lora", "ratio_to_floor", "peak_bytes", "trainable_parameters", "adjustment_seconds"}
    assert all(names <= row.keys() for row in rows)
    for row in rows:
        assert row["variant"] != "lora" or row["ratio_to_lora"] == 1
        assert row["variant"] != "floor" or row["ratio_to_floor"] == 1
        assert (row["adjustment_seconds"] is None) == (row["variant"] in ("floor", "lora", "adalora"))
        assert ("ratio_by_kind" in row) == row["variant"].startswith("pedyra")
        assert row["peak_bytes"] > 4 * row["trainable_parameters"]


def test_the_file_keeps_rows_of_other_settings_and_replaces_those_of_the_same(tmp_path, call):
    file = tmp_path / "rows.jsonl"

    def run(method: str, batch: str) -> list[Any]:
        arguments = ["--smoke", "--threads", "1", "--json", str(file), "--batch", batch, "--method", method]
        assert call(step, *arguments)[0] == 0
        return [json.loads(line) for line in file.read_text().splitlines()]

    (first,) = run("floor", "2")
    assert [(row["variant"], row["batch"]) for row in run("lora", "2")] == [("floor", 2), ("lora", 2)]
    assert [(row["variant"], row["batch"]) for row in run("floor", "1")][2:] == [("floor", 1)]
    *others, last = run("floor", "2")
    assert [(row["variant"], row["batch"]) for row in others] == [("lora", 2), ("floor", 1)]
    assert last["variant"] == "floor" and last["step_seconds"] != first["step_seconds"]


def test_a_run_has_the_papers_median_schedule_or_what_is_given():
    assert run_schedule(parse_method("pedyra:interval=0.023"), 1000).adjustments == range(
        83, 360, 23
    )  # 360 = T - 0.64 T
    given = parse_method("pedyra:interval=10,initial_warmup=20,final_warmup=60")
    assert tuple(run_schedule(given, 100).adjustments) == (30,)  # 40 is not before 100 - 60


def test_the_measured_steps_are_of_both_kinds_and_adjusted():
    variant, batch = built("pedyra")
    measure({"pedyra": variant}, batch, SHORT)
    assert variant.observed == [True] * 8 + [False] * 8
    assert len(variant.seconds) == 16 and len(variant.adjustments) == 4


def test_a_method_steps_as_its_loop_does():
    """LoRA+ in the benchmark: B moves by 16 times A's rate, and its hooks were begun."""
    variant, batch = built("lora+")
    before = {name: p.detach().clone() for name, p in variant.model.named_parameters() if p.requires_grad}
    variant.step(batch, lambda: 0.0)
    after = dict(variant.model.named_parameters())
    moved = {name: float((after[name].detach() - old).abs().max()) for name, old in before.items()}
    largest = {factor: max(size for name, size in moved.items() if f"lora_{factor}" in name) for factor in "AB"}
    # A has no gradient as long as B is 0; what moves it is the weight decay.
    assert largest["A"] < 1e-5 and largest["B"] == pytest.approx(16e-4, rel=0.05)


def test_the_floor_trains_no_adapter_but_sends_gradients_through_the_model():
    floor, batch = built(FLOOR)
    assert not any(p.requires_grad for p in floor.model.parameters())
    seen: list[torch.Tensor] = []
    floor.model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    floor.step(batch, lambda: 0.0)
    assert seen[0].requires_grad


def test_peak_memory_counts_every_storage_once():
    variant, batch = built("lora")
    variant.step(batch, lambda: 0.0)
    parameters = sum(p.numel() for p in variant.model.parameters()) * 4
    trained = sum(p.numel() for p in variant.model.parameters() if p.requires_grad) * 4
    least = parameters + 3 * trained  # gradients and two moments
    assert least < peak_bytes(variant, batch, "cpu") < 3 * least
    x = torch.zeros(10)
    assert list(storages([x, x[2:], x.view(2, 5)]).values()) == [40]


def test_peak_memory_counts_the_scores_once(monkeypatch):
    variant, batch = built("pedyra")
    measure({"pedyra": variant}, batch, SHORT)
    scores = sum(tensor.numel() * tensor.element_size() for tensor in variant.state())
    peak = peak_bytes(variant, batch, "cpu")
    monkeypatch.setattr(variant, "state", list)
    assert scores > 0 and peak - peak_bytes(variant, batch, "cpu") == scores


def test_the_ratios_of_a_kind_are_those_of_its_steps():
    observed, ratios = [False, True] * 3 + [False] * 4, [1.0, 10.0, 2.0, 20.0, 3.0, 30.0, 4.0, 5.0, 6.0, 7.0]
    assert quartiles_by_kind(observed, ratios) == {"idle": [2.0, 4.0, 6.0], "observed": [10.0, 20.0, 30.0]}


def test_the_ratio_of_a_run_lies_between_its_quartiles():
    """Half of the measured steps are slow, and 8 of the 100 of the run."""
    schedule = run_schedule(parse_method("pedyra:interval=10,initial_warmup=20,final_warmup=60"), 100)
    by_kind = {"observed": [9.0, 10.0, 12.0], "idle": [1.0, 1.1, 1.5]}
    low, ratio, high = over_a_run(by_kind, 3.0, schedule, window=8)
    assert low == pytest.approx((92 * 1.0 + 8 * 9 + 3) / 100)
    assert ratio == pytest.approx((92 * 1.1 + 8 * 10 + 3) / 100)
    assert high == pytest.approx((92 * 1.5 + 8 * 12 + 3) / 100)


def test_a_method_that_takes_a_batch_for_each_step_of_the_run_is_timed():
    (row,) = bench_step(["llama-32x1"], ["autolora"], Timing(rounds=8, batch=2, length=8))
    assert row["ratio_to_lora"] > 0

"""`pedyra bench step`: what a training step costs, against PEFT's methods and against no adapter at all.

All variants train in one process, one step each in turn, so that whatever else the machine does hits all alike; a
ratio is the median over rounds of a variant's step by LoRA's (or the floor's) of the same round.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median, quantiles
from typing import Any

import torch

from pedyra.config import RankConfig
from pedyra.core.schedule import Schedule, ema_window
from pedyra.experiments.bench_models import bench_model
from pedyra.experiments.bench_variants import VARIANTS, Clock, Setting, Variant, build
from pedyra.experiments.memory import peak_bytes
from pedyra.training.gradient_sketch import LEAST_STEPS
from pedyra.training.sketching import schedule_of

COLUMNS = {
    "model": "model", "variant": "variant", "ratio_to_lora": "by lora", "ratio_to_floor": "by floor",
    "peak_bytes": "peak bytes", "trainable_parameters": "trained", "adjustment_seconds": "adjustment, s",
}  # fmt: skip
"""Columns of a row for people, with their titles."""
_WARMUP = 3


def bench_step(
    models: Sequence[str],
    *,
    variants: Sequence[str] = VARIANTS,
    rounds: int = 20,
    rank: int = 8,
    batch: int | None = None,
    length: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    gradient_checkpointing: bool = False,
    run_steps: int = 1000,
    cpu_time: bool = False,
    config: RankConfig | None = None,
) -> Iterator[dict[str, Any]]:
    """One row per model and variant, as each model is done.

    `rounds` steps of each variant are timed while pedyra observes (with adjustments among them), and as many while it
    does not; its `ratio_to_lora` weighs the kinds of steps, and adds the adjustments, as they occur in a run of
    `run_steps` under `config` (RankConfig() by default). `ratio_by_kind` has the kinds apart. `cpu_time` counts
    processor time instead of the wall clock: for a machine that others use, with one thread.

    Raises:
        ValueError: an unknown model, variant, dtype or device, or too few rounds.
    """
    if rounds < (least := LEAST_STEPS + 1):
        raise ValueError(f"rounds is {rounds}; a sketch, and a step without one, need at least {least}")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r} is unknown; choose float32 or bfloat16")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but this machine has no CUDA device; use --device cpu")
    config = config or RankConfig()
    shared = {"rank": rank, "dtype": dtype, "device": device, "threads": torch.get_num_threads()}
    shared |= {"gradient_checkpointing": gradient_checkpointing, "rounds": rounds, "run_steps": run_steps}
    names = list(dict.fromkeys(["lora", "floor", *variants]))
    for name in models:
        model = bench_model(name, getattr(torch, dtype)).with_batch(batch, length)
        setting = Setting(
            model=model, rank=rank, device=device, gradient_checkpointing=gradient_checkpointing,
            config=measured_config(config, rounds), total_steps=_WARMUP + 2 * rounds,
        )  # fmt: skip
        clock = _clock(device, cpu_time)
        built = {variant: build(variant, setting, clock) for variant in names}
        seconds, adjustments, peaks = measure(built, setting, clock)
        for variant in variants:
            row = _row(built[variant], seconds, adjustments[variant], schedule_of(config, run_steps), config)
            yield {"model": name, "variant": variant, **row, "peak_bytes": peaks[variant],
                   "trainable_parameters": sum(p.numel() for p in built[variant].trainable()),
                   "batch": model.batch, "length": model.length, **shared}  # fmt: skip


def measured_config(config: RankConfig, rounds: int) -> RankConfig:
    """`config` on the schedule of the measured steps: every one observed until the last adjustment, none after it."""
    interval = max(LEAST_STEPS + 1, rounds // 2)
    return replace(
        config,
        initial_warmup=_WARMUP,
        interval=interval,
        final_warmup=rounds - 1,
        sketch_steps=max(LEAST_STEPS, interval // 2),
    )


def measure(
    built: dict[str, Variant], setting: Setting, clock: Clock
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, int]]:
    """Seconds of every step after the warm-up, of every adjustment, and the peak memory, by variant."""
    batch = setting.tensors()
    seconds: dict[str, list[float]] = {name: [] for name in built}
    adjustments: dict[str, list[float]] = {name: [] for name in built}
    peaks: dict[str, int] = {}
    for round_ in range(setting.total_steps):
        for name, variant in built.items():
            step, adjustment = variant.step(batch, clock)
            if round_ >= _WARMUP:
                seconds[name].append(step)
            if adjustment is not None:
                adjustments[name].append(adjustment)
        if round_ == _WARMUP:  # while pedyra observes, and before a masked method's gradients are gone
            peaks = {name: peak_bytes(variant, batch, setting.device) for name, variant in built.items()}
    return seconds, adjustments, peaks


def step_kind(step: int, schedule: Schedule, config: RankConfig) -> str:
    """What pedyra does in a step: nothing ("idle"), Eqs. 3 and 6 ("tracked"), or directions as well ("sketched")."""
    adjustment = schedule.next_adjustment(step)
    if adjustment is None:
        return "idle"
    sketches = "gradient" in (config.init, config.expand)
    if sketches and adjustment - step < min(config.sketch_steps, schedule.interval):
        return "sketched"
    return "tracked" if adjustment - step < ema_window(max(config.beta1, config.beta2)) else "idle"


def _row(
    variant: Variant, seconds: dict[str, list[float]], adjustments: list[float], run: Schedule, config: RankConfig
) -> dict[str, Any]:
    own, lora, floor = seconds[variant.name], seconds["lora"], seconds["floor"]
    to_lora = [a / b for a, b in zip(own, lora, strict=True)]
    to_floor = [a / b for a, b in zip(own, floor, strict=True)]
    adjustment = median(adjustments) if adjustments else variant.setup_seconds
    low, _, high = quantiles(to_lora, n=4)
    row = {"ratio_to_lora": median(to_lora), "ratio_to_floor": median(to_floor)}
    if variant.allocator is not None:
        by_kind, row = _over_a_run(variant.allocator, to_lora, to_floor, run, config)
        row["ratio_to_lora"] += len(run.adjustments) * (adjustment or 0.0) / run.total_steps / median(lora)
        row["ratio_to_floor"] += len(run.adjustments) * (adjustment or 0.0) / run.total_steps / median(floor)
        row |= {"ratio_by_kind": by_kind}
    return {**row, "ratio_quartiles": [low, high], "adjustment_seconds": adjustment, "step_seconds": median(own)}


def _over_a_run(
    allocator: Any, to_lora: list[float], to_floor: list[float], run: Schedule, config: RankConfig
) -> tuple[dict[str, float], dict[str, float]]:
    """The ratio of each kind of step, and both ratios over a whole run without its adjustments."""
    measured = [
        step_kind(step, allocator.schedule, allocator.config) for step in range(_WARMUP + 1, allocator.step + 1)
    ]
    by_kind = {
        kind: [median(r for r, k in zip(ratios, measured, strict=True) if k == kind) for ratios in (to_lora, to_floor)]
        for kind in sorted(set(measured))
    }
    shares = Counter(step_kind(step, run, config) for step in range(1, run.total_steps + 1))
    whole = [sum(by_kind[kind][i] * count for kind, count in shares.items()) / run.total_steps for i in (0, 1)]
    by_lora = {kind: ratios[0] for kind, ratios in by_kind.items()}
    return by_lora, {"ratio_to_lora": whole[0], "ratio_to_floor": whole[1]}


def _clock(device: str, cpu_time: bool) -> Clock:
    if device == "cuda":

        def synchronised() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return synchronised
    return time.process_time if cpu_time else time.perf_counter

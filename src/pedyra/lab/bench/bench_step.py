"""`pedyra bench step`: what a training step costs, against PEFT's methods and against no adapter at all.

All variants train in one process, one step each in random order, so that whatever else the machine does hits all alike;
a ratio is the median over rounds of a variant's step by LoRA's (or the floor's) of the same round.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from random import Random
from statistics import median, quantiles
from typing import Any

import torch

from pedyra.allocate.schedule import Schedule
from pedyra.lab.bench.bench_models import bench_model
from pedyra.lab.bench.bench_variants import VARIANTS, Clock, Setting, Variant, build
from pedyra.lab.bench.device import check_device
from pedyra.lab.bench.memory import peak_bytes
from pedyra.pe_dyra.method import PeDyra
from pedyra.pe_dyra.scored import ema_window

COLUMNS = {
    "model": "model", "variant": "variant", "ratio_to_lora": "by lora", "spread": "quartiles",
    "ratio_to_floor": "by floor", "peak_bytes": "peak bytes", "trainable_parameters": "trained",
    "adjustment_seconds": "adjustment, s",
}  # fmt: skip
"""Columns of a row for people, with their titles."""
LEAST_ROUNDS = 8
"""Of each kind of step: one adjustment in four of them, twice."""
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
) -> Iterator[dict[str, Any]]:
    """One row per model and variant, as each model is done.

    Twice `rounds` steps of each variant are timed: PE-DyRA observes the first half, and has nothing to do in the other.
    Its `ratio_to_lora` weighs both, and adds the adjustments, as they occur in a run of `run_steps` under PeDyra(), the
    paper's median schedule. `ratio_by_kind` has the two apart.
    `cpu_time` counts processor time instead of the wall clock: for a machine that others use, with one thread.

    Raises:
        ValueError: an unknown model, variant, dtype or device, too few rounds, or a run too short for an adjustment.
    """
    if rounds < LEAST_ROUNDS:
        raise ValueError(f"rounds is {rounds}; what is measured takes at least {LEAST_ROUNDS}")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r} is unknown; choose float32 or bfloat16")
    check_device(device)
    run = PeDyra().method().schedule(run_steps)
    shared = {"rank": rank, "dtype": dtype, "device": device, "threads": torch.get_num_threads()}
    shared |= {"gradient_checkpointing": gradient_checkpointing, "rounds": rounds, "run_steps": run_steps}
    names = list(dict.fromkeys(["lora", "floor", *variants]))
    known = [bench_model(name, getattr(torch, dtype)).with_batch(batch, length) for name in models]  # all told at once
    for name, model in zip(models, known, strict=True):
        setting = Setting(
            model=model, rank=rank, device=device, gradient_checkpointing=gradient_checkpointing,
            config=measured(rounds), total_steps=_WARMUP + 2 * rounds,
        )  # fmt: skip
        clock = _clock(device, cpu_time)
        built = {variant: build(variant, setting, clock) for variant in names}
        seconds, adjustments, peaks = measure(built, setting, clock)
        for variant in variants:
            row = _row(built[variant], seconds, adjustments[variant], run)
            yield {"model": name, "variant": variant, **row, "peak_bytes": peaks[variant],
                   "trainable_parameters": sum(p.numel() for p in built[variant].trainable()),
                   "batch": model.batch, "length": model.length, **shared}  # fmt: skip


def measured(rounds: int) -> PeDyra:
    """The schedule of the measured steps: `rounds` that are observed, with adjustments among them, and `rounds` that
    are not."""
    return PeDyra(initial_warmup=_WARMUP, interval=rounds // 4, final_warmup=rounds - 1)


def measure(
    built: dict[str, Variant], setting: Setting, clock: Clock
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, int]]:
    """Seconds of every step after the warm-up, of every adjustment, and the peak memory, by variant."""
    batch = setting.tensors()
    seconds: dict[str, list[float]] = {name: [] for name in built}
    adjustments: dict[str, list[float]] = {name: [] for name in built}
    peaks: dict[str, int] = {}
    order = Random(0)
    for round_ in range(setting.total_steps):
        # In another order each time: what a step leaves in caches and the allocator is the next one's to bear.
        for name, variant in order.sample(list(built.items()), len(built)):
            if variant.allocator is not None and round_ >= _WARMUP:
                variant.observed.append(variant.allocator.tracks(variant.allocator.step + 1))
            step, adjustment = variant.step(batch, clock)
            if round_ >= _WARMUP:
                seconds[name].append(step)
            if adjustment is not None:
                adjustments[name].append(adjustment)
        if round_ == _WARMUP + 1:  # while PE-DyRA observes
            peaks = {name: peak_bytes(variant, batch, setting.device) for name, variant in built.items()}
    return seconds, adjustments, peaks


def observed_steps(run: Schedule, window: int) -> int:
    """How many steps of a run are observed: those that an EMA still remembers at the next adjustment."""
    ahead = ((run.next_adjustment(step), step) for step in range(1, run.total_steps + 1))
    return sum(adjustment is not None and adjustment - step < window for adjustment, step in ahead)


def over_a_run(observed: float, idle: float, adjustment: float, run: Schedule) -> float:
    """The mean ratio of the steps of a run, with its adjustments.

    Args:
        observed, idle: the ratio of a step of each kind.
        adjustment: what one costs, in steps of what the ratios refer to.
    """
    settings = PeDyra()
    count = observed_steps(run, ema_window(max(settings.beta1, settings.beta2)))
    steps = count * observed + (run.total_steps - count) * idle
    return (steps + len(run.adjustments) * adjustment) / run.total_steps


def _row(variant: Variant, seconds: dict[str, list[float]], adjustments: list[float], run: Schedule) -> dict[str, Any]:
    own, lora, floor = seconds[variant.name], seconds["lora"], seconds["floor"]
    to_lora = [a / b for a, b in zip(own, lora, strict=True)]
    to_floor = [a / b for a, b in zip(own, floor, strict=True)]
    adjustment = median(adjustments) if adjustments else variant.setup_seconds
    low, _, high = quantiles(to_lora, n=4)
    row: dict[str, Any] = {"ratio_to_lora": median(to_lora), "ratio_to_floor": median(to_floor)}
    if variant.allocator is not None:
        by_lora, by_floor = (_by_kind(variant.observed, ratios) for ratios in (to_lora, to_floor))
        steps_of_lora, steps_of_floor = ((adjustment or 0.0) / median(steps) for steps in (lora, floor))
        row = {
            "ratio_to_lora": over_a_run(by_lora["observed"], by_lora["idle"], steps_of_lora, run),
            "ratio_to_floor": over_a_run(by_floor["observed"], by_floor["idle"], steps_of_floor, run),
            "ratio_by_kind": by_lora,
        }
    row |= {"ratio_quartiles": [low, high], "spread": f"{low:.3f} to {high:.3f}"}
    return {**row, "adjustment_seconds": adjustment, "step_seconds": median(own)}


def _by_kind(observed: Sequence[bool], ratios: Sequence[float]) -> dict[str, float]:
    """The median ratio of the observed and of the other timed steps."""
    pairs = list(zip(observed, ratios, strict=True))
    return {
        kind: median(r for seen, r in pairs if seen is which) for kind, which in (("observed", True), ("idle", False))
    }


def _clock(device: str, cpu_time: bool) -> Clock:
    if device == "cuda":

        def synchronised() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return synchronised
    return time.process_time if cpu_time else time.perf_counter

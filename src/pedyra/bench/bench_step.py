"""`pedyra bench step`: what a training step costs, against PEFT's methods and against no adapter at all.

All variants train in one process, one step each in random order, so that whatever else the machine does hits all alike;
a ratio is the median over rounds of a variant's step by LoRA's (or the floor's) of the same round.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from statistics import median, quantiles
from typing import Any

import torch

from pedyra.allocate.schedule import LEAST_STEPS, Schedule, parts_of
from pedyra.bench.bench_models import bench_model
from pedyra.bench.bench_variants import VARIANTS, Clock, Setting, Variant, build
from pedyra.bench.device import check_device
from pedyra.bench.memory import peak_bytes
from pedyra.config import RankConfig
from pedyra.methods.pedyra.reassignment import adjustment_of_reassignment
from pedyra.methods.pedyra.settings import Settings
from pedyra.methods.pedyra.sketching import schedule_of

COLUMNS = {
    "model": "model", "variant": "variant", "ratio_to_lora": "by lora", "spread": "quartiles",
    "ratio_settled": "settled",
    "ratio_to_floor": "by floor", "peak_bytes": "peak bytes", "trainable_parameters": "trained",
    "adjustment_seconds": "adjustment, s",
}  # fmt: skip
"""Columns of a row for people, with their titles."""
KINDS = ("idle", "sketched", "directions", "judged", "moved")
"""Of pedyra's steps, see `step_kind`; what `ratio_by_kind` may have."""
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

    `rounds` steps of each variant are timed while pedyra observes (with adjustments among them), and as many while it
    does not, half of them before; its `ratio_to_lora` weighs the kinds of steps, and adds the adjustments, as they
    occur in a run of `run_steps` under RankConfig() that never settles; `ratio_settled` in one
    in which nothing ever moves, not even at the deal, and which settles early. `ratio_by_kind` has the kinds apart,
    idle steps after the adjustments as "moved": products of 7 or 13 columns cost a CPU more than those of 8.
    `cpu_time` counts processor time instead of the wall clock: for a machine that others use, with one thread.

    Raises:
        ValueError: an unknown model, variant, dtype or device, or too few rounds.
    """
    if rounds < (least := LEAST_STEPS + 1):
        raise ValueError(f"rounds is {rounds}; a sketch, and a step without one, need at least {least}")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r} is unknown; choose float32 or bfloat16")
    check_device(device)
    config, settings = RankConfig(), Settings()
    shared = {"rank": rank, "dtype": dtype, "device": device, "threads": torch.get_num_threads()}
    shared |= {"gradient_checkpointing": gradient_checkpointing, "rounds": rounds, "run_steps": run_steps}
    names = list(dict.fromkeys(["lora", "floor", *variants]))
    known = [bench_model(name, getattr(torch, dtype)).with_batch(batch, length) for name in models]  # all told at once
    for name, model in zip(models, known, strict=True):
        setting = Setting(
            model=model, rank=rank, device=device, gradient_checkpointing=gradient_checkpointing,
            **measured(config, settings, rounds), total_steps=_WARMUP + 2 * rounds,
        )  # fmt: skip
        clock = _clock(device, cpu_time)
        built = {variant: build(variant, setting, clock) for variant in names}
        seconds, adjustments, peaks = measure(built, setting, clock)
        for variant in variants:
            run = schedule_of(config, run_steps)
            row = _row(built[variant], seconds, adjustments[variant], run, settings)
            yield {"model": name, "variant": variant, **row, "peak_bytes": peaks[variant],
                   "trainable_parameters": sum(p.numel() for p in built[variant].trainable()),
                   "batch": model.batch, "length": model.length, **shared}  # fmt: skip


def measured(config: RankConfig, settings: Settings, rounds: int) -> dict[str, Any]:
    """`config` and `settings` on the schedule of the measured steps: of two times `rounds` the middle are observed."""
    interval, before = max(LEAST_STEPS + 1, rounds // 2), rounds // 2
    schedule = dict(initial_warmup=_WARMUP + before, interval=interval, final_warmup=rounds - before - 1)
    return {"config": replace(config, **schedule), "settings": replace(settings, sketch_steps=interval - 1)}


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
            step, adjustment = variant.step(batch, clock)
            if round_ >= _WARMUP:
                seconds[name].append(step)
            if adjustment is not None:
                adjustments[name].append(adjustment)
        if round_ == int(setting.config.initial_warmup) + 1:  # in pedyra's first sketch
            peaks = {name: peak_bytes(variant, batch, setting.device) for name, variant in built.items()}
    return seconds, adjustments, peaks


def step_kind(step: int, schedule: Schedule, settings: Settings) -> str:
    """What pedyra does in a step.

    Nothing ("idle"), or a sketch: products with probes ("sketched"), at the end of its first
    two parts what becomes of them ("directions"), and in its third one gains and what the inputs have along each
    direction ("judged").
    """
    adjustment = schedule.next_adjustment(step)
    if adjustment is None:
        return "idle"
    window = min(settings.sketch_steps, schedule.interval)
    if adjustment - step >= window:
        return "idle"
    first, second, _ = parts_of(window)
    done = window - (adjustment - step)
    if done > first + second:
        return "judged"
    return "directions" if done in (first, first + second) else "sketched"


def settled_after(schedule: Schedule, settings: Settings) -> int:
    """The adjustment after which a run in which nothing ever moves is a plain LoRA; the last step if none is."""
    deal = adjustment_of_reassignment(settings, RankConfig(), schedule) or 0
    counted = [step for step in schedule.adjustments if step >= deal]
    settles = 0 < settings.patience <= len(counted)
    return counted[settings.patience - 1] if settles else schedule.total_steps


def over_a_run(
    ratios: Mapping[str, float], adjustment: float, run: Schedule, settings: Settings, last: int, *, moves: bool
) -> float:
    """The mean ratio of a run's steps, idle after step `last`, with its adjustments.

    Args:
        ratios: of each kind of step, see `step_kind`, and "moved", of idle ones after the measured adjustments.
        adjustment: what one costs, in steps of what the ratios refer to.
        moves: whether triples move, so that idle steps from the first adjustment on have other ranks.
    """
    kinds = [step_kind(step, run, settings) if step <= last else "idle" for step in range(1, run.total_steps + 1)]
    if moves and run.adjustments:
        first = run.adjustments[0]
        kinds[first:] = ["moved" if kind == "idle" else kind for kind in kinds[first:]]
    adjustments = sum(step <= last for step in run.adjustments)
    return (sum(ratios[kind] for kind in kinds) + adjustments * adjustment) / run.total_steps


def _row(
    variant: Variant, seconds: dict[str, list[float]], adjustments: list[float], run: Schedule, settings: Settings
) -> dict[str, Any]:
    own, lora, floor = seconds[variant.name], seconds["lora"], seconds["floor"]
    to_lora = [a / b for a, b in zip(own, lora, strict=True)]
    to_floor = [a / b for a, b in zip(own, floor, strict=True)]
    adjustment = median(adjustments) if adjustments else variant.setup_seconds
    low, _, high = quantiles(to_lora, n=4)
    row: dict[str, Any] = {
        "ratio_to_lora": median(to_lora),
        "ratio_settled": median(to_lora),
        "ratio_to_floor": median(to_floor),
    }
    if variant.allocator is not None:
        by_lora, by_floor = (_by_kind(variant.allocator, ratios) for ratios in (to_lora, to_floor))
        steps_of_lora, steps_of_floor = ((adjustment or 0.0) / median(steps) for steps in (lora, floor))
        settled = settled_after(run, settings)
        row = {
            "ratio_to_lora": over_a_run(by_lora, steps_of_lora, run, settings, run.total_steps, moves=True),
            "ratio_settled": over_a_run(by_lora, steps_of_lora, run, settings, settled, moves=False),
            "ratio_to_floor": over_a_run(by_floor, steps_of_floor, run, settings, run.total_steps, moves=True),
            "ratio_by_kind": by_lora,
        }
    row |= {"ratio_quartiles": [low, high], "spread": f"{low:.3f} to {high:.3f}"}
    return {**row, "adjustment_seconds": adjustment, "step_seconds": median(own)}


def _by_kind(allocator: Any, ratios: Sequence[float]) -> dict[str, float]:
    """The median ratio of each kind of the measured steps.

    Where so few are measured that a part of a sketch is one step, "sketched" is taken to cost what "directions" does.
    """
    by_kind: dict[str, list[float]] = {}
    for step, ratio in enumerate(ratios, start=_WARMUP + 1):
        kind = step_kind(step, allocator.schedule, allocator.run.settings)
        if kind == "idle" and step > allocator.schedule.adjustments[-1]:
            kind = "moved"
        by_kind.setdefault(kind, []).append(ratio)
    if "directions" in by_kind:
        by_kind.setdefault("sketched", by_kind["directions"])
    return {kind: median(values) for kind, values in sorted(by_kind.items())}


def _clock(device: str, cpu_time: bool) -> Clock:
    if device == "cuda":

        def synchronised() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return synchronised
    return time.process_time if cpu_time else time.perf_counter

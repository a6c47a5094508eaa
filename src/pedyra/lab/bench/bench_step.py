"""`pedyra bench step`: what a training step costs, against PEFT's methods and against no adapter at all.

All variants train in one process, one step each in random order, so that whatever else the machine does hits all alike;
a ratio is the median over rounds of a variant's step by LoRA's (or the floor's) of the same round.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from statistics import median, quantiles
from typing import Any

import torch

from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.allocate.schedule import Schedule
from pedyra.config import RankConfig
from pedyra.lab.bench.bench_models import bench_model
from pedyra.lab.bench.bench_variants import VARIANTS, Clock, Setting, Variant, build
from pedyra.lab.bench.device import check_device
from pedyra.lab.bench.memory import peak_bytes
from pedyra.methods.pedyra.method import LEAST_INTERVAL, Fit
from pedyra.methods.pedyra.run import LOOK_BACK, WINDOW, FitRun, most_batches

COLUMNS = {
    "model": "model", "variant": "variant", "ratio_to_lora": "by lora", "spread": "quartiles",
    "ratio_to_floor": "by floor", "peak_bytes": "peak bytes", "trainable_parameters": "trained",
    "adjustment_seconds": "adjustment, s",
}  # fmt: skip
"""Columns of a row for people, with their titles."""
KINDS = ("idle", "measured", "looked", "asked", "cut")
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

    Four times `rounds` steps of each variant are timed: pedyra does nothing, measures, asks, and has cut. Its
    `ratio_to_lora` weighs the kinds of steps, and adds the adjustments, as they occur in a run of `run_steps` under
    RankConfig() in which nothing may go: the most that it costs. `ratio_by_kind` has the kinds apart.
    `cpu_time` counts processor time instead of the wall clock: for a machine that others use, with one thread.

    Raises:
        ValueError: an unknown model, variant, dtype or device, too few rounds, or a run too short for an adjustment.
    """
    if rounds < LEAST_INTERVAL:
        raise ValueError(f"rounds is {rounds}; what is measured takes at least {LEAST_INTERVAL}")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r} is unknown; choose float32 or bfloat16")
    check_device(device)
    run = Fit().schedule(RankConfig(), run_steps)
    shared = {"rank": rank, "dtype": dtype, "device": device, "threads": torch.get_num_threads()}
    shared |= {"gradient_checkpointing": gradient_checkpointing, "rounds": rounds, "run_steps": run_steps}
    names = list(dict.fromkeys(["lora", "floor", *variants]))
    known = [bench_model(name, getattr(torch, dtype)).with_batch(batch, length) for name in models]  # all told at once
    for name, model in zip(models, known, strict=True):
        setting = Setting(
            model=model, rank=rank, device=device, gradient_checkpointing=gradient_checkpointing,
            config=measured(rounds), total_steps=_WARMUP + 4 * rounds,
        )  # fmt: skip
        clock = _clock(device, cpu_time)
        built = {variant: build(variant, setting, clock) for variant in names}
        seconds, adjustments, peaks = measure(built, setting, clock)
        for variant in variants:
            row = _row(built[variant], seconds, adjustments[variant], run)
            yield {"model": name, "variant": variant, **row, "peak_bytes": peaks[variant],
                   "trainable_parameters": sum(p.numel() for p in built[variant].trainable()),
                   "batch": model.batch, "length": model.length, **shared}  # fmt: skip


def measured(rounds: int) -> RankConfig:
    """The schedule of the measured steps: `rounds` before the window, in it, in which it asks, and after the cut."""
    return RankConfig(initial_warmup=_WARMUP + rounds, interval=rounds, final_warmup=rounds - 1)


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
                variant.kinds.append(step_kind(variant.allocator))
            step, adjustment = variant.step(batch, clock)
            if round_ >= _WARMUP:
                seconds[name].append(step)
            if adjustment is not None:
                adjustments[name].append(adjustment)
        if round_ == int(setting.config.initial_warmup) + 1:  # while pedyra measures
            peaks = {name: peak_bytes(variant, batch, setting.device) for name, variant in built.items()}
    return seconds, adjustments, peaks


def step_kind(allocator: RankAllocator) -> str:
    """What pedyra does in the step that comes.

    Nothing ("idle"); sums over tokens ("measured"), and the batch run twice more at the end of the window ("looked") or
    with a question ("asked"); nothing, with what is left after a cut ("cut").
    """
    run = allocator.run
    assert isinstance(run, FitRun)
    if run.asking is not None and run.asking.question is not None:
        return "asked"
    if run.gramians is not None:
        adjustment = allocator.schedule.next_adjustment(allocator.step + 1)
        return "looked" if adjustment is not None and adjustment - allocator.step <= LOOK_BACK else "measured"
    return "cut" if run.cuts else "idle"


def kinds_of_a_run(run: Schedule) -> dict[str, int]:
    """How many steps of each kind a run has in which nothing may ever go: at every second adjustment it has measured,
    and it asks until it has asked as much as a run may."""
    windows = (len(run.adjustments) + 1) // 2
    measured = max(run.interval, round(WINDOW * run.total_steps)) + (windows - 1) * run.interval
    looked, asked = windows * min(LOOK_BACK, run.interval), most_batches(run.total_steps)
    kinds = {"measured": measured - looked, "looked": looked, "asked": asked}
    return {"idle": max(0, run.total_steps - sum(kinds.values())), **kinds}


def over_a_run(ratios: Mapping[str, float], adjustment: float, run: Schedule) -> float:
    """The mean ratio of such a run's steps, with its adjustments.

    Args:
        ratios: of each kind of step, see `step_kind`.
        adjustment: what one costs, in steps of what the ratios refer to.
    """
    kinds = kinds_of_a_run(run)
    steps = sum(count * ratios[kind] for kind, count in kinds.items() if count)
    return (steps + len(run.adjustments) * adjustment) / sum(kinds.values())


def _row(variant: Variant, seconds: dict[str, list[float]], adjustments: list[float], run: Schedule) -> dict[str, Any]:
    own, lora, floor = seconds[variant.name], seconds["lora"], seconds["floor"]
    to_lora = [a / b for a, b in zip(own, lora, strict=True)]
    to_floor = [a / b for a, b in zip(own, floor, strict=True)]
    adjustment = median(adjustments) if adjustments else variant.setup_seconds
    low, _, high = quantiles(to_lora, n=4)
    row: dict[str, Any] = {"ratio_to_lora": median(to_lora), "ratio_to_floor": median(to_floor)}
    if variant.allocator is not None:
        by_lora, by_floor = (_by_kind(variant.kinds, ratios) for ratios in (to_lora, to_floor))
        missing = [kind for kind in KINDS if kind not in by_lora]
        if missing:
            raise ValueError(f"no step was {' or '.join(missing)}; raise --rounds")
        steps_of_lora, steps_of_floor = ((adjustment or 0.0) / median(steps) for steps in (lora, floor))
        row = {
            "ratio_to_lora": over_a_run(by_lora, steps_of_lora, run),
            "ratio_to_floor": over_a_run(by_floor, steps_of_floor, run),
            "ratio_by_kind": by_lora,
        }
    row |= {"ratio_quartiles": [low, high], "spread": f"{low:.3f} to {high:.3f}"}
    return {**row, "adjustment_seconds": adjustment, "step_seconds": median(own)}


def _by_kind(kinds: Sequence[str], ratios: Sequence[float]) -> dict[str, float]:
    """The median ratio of each kind of the measured steps."""
    by_kind: dict[str, list[float]] = {}
    for kind, ratio in zip(kinds, ratios, strict=True):
        by_kind.setdefault(kind, []).append(ratio)
    return {kind: median(by_kind[kind]) for kind in KINDS if kind in by_kind}


def _clock(device: str, cpu_time: bool) -> Clock:
    if device == "cuda":

        def synchronised() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return synchronised
    return time.process_time if cpu_time else time.perf_counter

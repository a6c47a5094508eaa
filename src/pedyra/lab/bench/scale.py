"""`pedyra bench scale`: how the cost of rank adaptation grows with layers, rank, triples, sequence length and batch.

Each measure is fitted as c * size^p over its axis; p above 1 would mean that pedyra does not scale. All sizes of an
axis are measured in turn, several times over, on the processor's clock, so that what else the machine does falls on
small and large sizes alike.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from pedyra.allocate.checkpoint import restore, save_state
from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.app.export.export import export_adapter
from pedyra.fitting.gramians import Gramians
from pedyra.lab.bench.measuring import check_device, now, storages, timed
from pedyra.lora.attach import attach
from pedyra.lora.layer import AdaptedLayer
from pedyra.pe_dyra.method import PeDyra

LARGEST_EXPONENT = 1.05
"""Linear, and what noise may add."""


@dataclass(frozen=True, kw_only=True)
class ChainSize:
    """One point of an axis; `triples` is layers times rank."""

    layers: int = 36
    rank: int = 8
    width: int = 128
    length: int = 64
    batch: int = 4


AXES: dict[str, tuple[ChainSize, ...]] = {
    "layers": tuple(ChainSize(layers=n) for n in (36, 72, 144, 288, 512)),
    "rank": tuple(ChainSize(rank=n, width=256) for n in (1, 4, 16, 64, 256)),
    "triples": tuple(ChainSize(layers=n, rank=100, length=16) for n in (10, 32, 100, 320, 1000)),
    "length": tuple(ChainSize(length=n) for n in (32, 64, 128, 256, 512)),
    "batch": tuple(ChainSize(batch=n) for n in (2, 4, 8, 16, 32)),
}
SMOKE_AXES: dict[str, tuple[ChainSize, ...]] = {
    "layers": tuple(ChainSize(layers=n, width=32) for n in (4, 8)),
    "rank": tuple(ChainSize(layers=4, rank=n, width=32) for n in (2, 4)),
}
MEASURES = ("overhead_seconds", "measuring_seconds", "adjustment_seconds", "step_seconds", "state_bytes")
_STEPS = 6  # of a window in which method wide measures


def bench_scale(
    axes: dict[str, tuple[ChainSize, ...]] = AXES, *, device: str = "cpu", operations: int = 512
) -> Iterator[dict[str, Any]]:
    """One row per size, one fit per axis and measure, and one for a model of `operations` layers.

    A size's row has the seconds of one observed step, of what observing adds to it (gradients and input energies), of
    what the sums of method wide add, of one adjustment, and the bytes of the score state; each the median over
    three. A fit has the `exponent` of these medians.
    """
    check_device(device)
    where = {"device": device, "threads": torch.get_num_threads()}
    for axis, sizes in axes.items():
        runs = [[measure(size, device=device) for size in sizes] for _ in range(3)]
        medians = [{name: median(run[name] for run in each) for name in MEASURES} for each in zip(*runs, strict=True)]
        values = [size.layers * size.rank if axis == "triples" else getattr(size, axis) for size in sizes]
        for value, size, found in zip(values, sizes, medians, strict=True):
            row = {"axis": axis, "value": value, **asdict(size), "triples": size.layers * size.rank}
            yield {"kind": "size", **where, **row, **found}
        for name in MEASURES:
            exponent = growth(values, [found[name] for found in medians])
            yield {"kind": "fit", **where, "axis": axis, "values": values, "measure": name, "exponent": exponent}
    yield {"kind": "operations", **where, "device": "cpu", "layers": operations, **operation_seconds(operations)}


class Chain(nn.Module):
    """x -> x + W_l x / layers, layer after layer: nothing but the adapters grows."""

    def __init__(self, size: ChainSize) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size.width, size.width, bias=False) for _ in range(size.layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) / len(self.layers)
        return x


def adapted_chain(size: ChainSize) -> Any:
    """A chain with a LoRA on every layer."""
    torch.manual_seed(0)
    return get_peft_model(Chain(size), LoraConfig(r=size.rank, target_modules=r"layers\.\d+"))  # type: ignore[arg-type]


def growth(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The exponent p of the least-squares fit cost = c * size^p."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(costs, 1e-9)), 1)[0])


def measure(size: ChainSize, *, device: str = "cpu", steps: int = 8) -> dict[str, Any]:
    """Medians over `steps` observed steps, with an adjustment after every second one."""
    model, optimizer, allocator = _prepared(size, device, total_steps=steps + 2)
    x = torch.randn(size.batch, size.length, size.width, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in ("bare", "forward", "observe", "step", "adjustment")}
    for step in range(steps + 1):
        model.eval()  # inputs are observed in training alone
        bare = timed(device, lambda: model(x).sum())
        model.train()
        began = now(device)
        loss = model(x).sum()
        forward = now(device) - began
        loss.backward()
        observe = timed(device, allocator.before_step)
        optimizer.step()
        optimizer.zero_grad()
        whole = now(device) - began
        adjustment = timed(device, allocator.after_step)
        if step == 0:
            continue  # warm-up
        for name, value in (("bare", bare), ("forward", forward), ("observe", observe), ("step", whole)):
            seconds[name].append(value)
        if allocator.history and allocator.history[-1]["step"] == allocator.step:
            seconds["adjustment"].append(adjustment)
    medians = {name: median(values) for name, values in seconds.items()}
    state = sum(storages(allocator.run.tensors().values()).values())
    allocator.release()
    return {
        "overhead_seconds": medians["observe"] + max(0.0, medians["forward"] - medians["bare"]),
        "measuring_seconds": _measuring_seconds(model, allocator.layers, x, rounds=max(2, steps // 4)),
        "adjustment_seconds": medians["adjustment"],
        "step_seconds": medians["step"],
        "state_bytes": state,
    }


def _measuring_seconds(model: Any, layers: Sequence[AdaptedLayer], x: Tensor, rounds: int) -> float:
    """What the sums of a window add to each of its steps; the median over `rounds` windows."""
    device = x.device.type

    def window(gramians: Gramians | None) -> float:
        for layer in layers:
            layer.a.observer = None if gramians is None else gramians.observer(layer.name)
        began = now(device)
        for _ in range(_STEPS):
            model(x).sum().backward()
            if gramians is not None:
                gramians.close(torch.tensor(float(x[..., 0].numel()), device=device))
            model.zero_grad()
        return now(device) - began

    factors = {layer.name: layer.a.A for layer in layers}
    added = []
    for _ in range(rounds + 1):
        bare = window(None)
        added.append(window(Gramians(factors)) - bare)
    window(None)
    return max(0.0, median(added[1:])) / _STEPS


def operation_seconds(layers: int) -> dict[str, float]:
    """Seconds on a chain of `layers`: to attach, adjust once, save, write the checkpoint's side file, and export.

    And to read: the adapter by PEFT, into the base model, and a checkpoint by an allocator that begins anew.
    """
    size = ChainSize(layers=layers, width=256)
    model = adapted_chain(size)
    result = {"attach_seconds": timed("cpu", lambda: attach(model))}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    allocator = RankAllocator(model, optimizer, _config(), total_steps=4)
    x = torch.randn(1, 16, size.width)
    while not allocator.history:
        model(x).sum().backward()
        allocator.before_step()
        optimizer.step()
        optimizer.zero_grad()
        result["adjustment_seconds"] = timed("cpu", allocator.after_step)
    with tempfile.TemporaryDirectory() as folder:
        saved, base, fresh = f"{folder}/adapter", Chain(size), _prepared(size, "cpu", 4)[2]
        result["save_seconds"] = timed("cpu", lambda: model.save_pretrained(saved))
        result["checkpoint_seconds"] = timed("cpu", lambda: save_state(allocator, Path(saved)))
        result["export_seconds"] = timed("cpu", lambda: export_adapter(saved, "padded", f"{folder}/padded"))
        result["load_seconds"] = timed("cpu", lambda: PeftModel.from_pretrained(base, saved))  # type: ignore[arg-type]
        result["resume_seconds"] = timed("cpu", lambda: restore(fresh, Path(saved)))
    return result


def _prepared(size: ChainSize, device: str, total_steps: int) -> tuple[Any, torch.optim.Optimizer, RankAllocator]:
    model = adapted_chain(size).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    return model, optimizer, RankAllocator(model, optimizer, _config(), total_steps=total_steps)


def _config() -> PeDyra:
    # Triples that move at every adjustment, also at rank 1.
    schedule: dict[str, Any] = dict(initial_warmup=0, interval=2, final_warmup=1)
    return PeDyra(**schedule, moves=None, budget="parameters", start="lora", min_rank=0)

"""What a machine with CUDA says of pedyra: `make gpu`, or `make gpu GPU="--model llama-1024x16"`.

Parity (the same run on the CPU and on the device, float32 and bfloat16), `benchmarks.step`, and two processes over NCCL
where there are two devices. It writes gpu.json and gpu.md. With --cpu the device is the CPU, which tests the script
itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

import pedyra
from benchmarks.models import bench_model
from benchmarks.step import Timing, bench_step
from pedyra import PeDyra, RankAllocator
from pedyra.allocate.distributed import wrap_again

TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}
"""Of a loss, relative, between the CPU in float32 and the device, while both have the same ranks."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-512x8", help="as of benchmarks.step")
    parser.add_argument("--rounds", type=int, default=20, help="of benchmarks.step")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--processes", type=int, default=None, help="default: two where there are two devices")
    parser.add_argument("--cpu", action="store_true", help="run everything on the CPU")
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    device = "cpu" if given.cpu else "cuda"
    if given.worker:
        return worker(device)
    try:
        bench_model(given.model)
    except ValueError as error:
        parser.error(f"--model: {error}")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; --cpu runs the same on the processor")
    count = (
        given.processes if given.processes is not None else min(2, torch.cuda.device_count() if not given.cpu else 1)
    )
    given.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(device), "model": given.model}
    parts = {
        "parity": lambda: parity(device),
        "step": lambda: step(given, device),
        "processes": lambda: processes(device, count),
    }
    for name, measure in parts.items():
        began = time.perf_counter()
        try:
            report[name] = measure()
        except Exception as error:  # the other parts say something all the same
            report[name] = {"failed": f"{type(error).__name__}: {error}"}
        report[f"{name}_seconds"] = round(time.perf_counter() - began, 1)
        (given.out / "gpu.json").write_text(json.dumps(report, indent=2) + "\n")  # what there is, if the next one fails
        (given.out / "gpu.md").write_text(markdown(report))
        print(f"{name}: {report[f'{name}_seconds']} s", flush=True)
    return report


def machine(device: str) -> dict[str, Any]:
    named = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": named,
        "devices": torch.cuda.device_count() if device == "cuda" else 1,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "pedyra": pedyra.__version__,
    }


def trained(
    device: str, dtype: torch.dtype, *, steps: int = 24, rank: int = 0, size: int = 1, rate: float = 1e-2
) -> dict[str, Any]:
    """Losses and ranks of PE-DyRA on a small random Llama, whose weights and batches are those of the CPU.

    Args:
        rank, size: of this process among those that share every batch.
    """
    made = bench_model("llama-64x2", dtype).with_batch(8, 32)
    torch.manual_seed(0)
    model: Any = get_peft_model(
        made.build(),  # type: ignore[arg-type]
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules="all-linear"),
        autocast_adapter_dtype=False,
    ).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    config = PeDyra.as_published(interval=4, initial_warmup=2, final_warmup=8, moves=6, start="lora")
    allocator = RankAllocator(model, optimizer, config, total_steps=steps)
    wrapped = DistributedDataParallel(model) if size > 1 else model
    losses, adjusted, moved = [], [], 0
    for number in range(steps):
        batch = {key: value[rank::size].to(device) for key, value in made.example(number % 4).items()}
        batch.pop("attention_mask")  # every process has as many tokens
        batch["labels"] = batch["input_ids"]
        loss = wrapped(**batch).loss
        loss.backward()
        allocator.before_step()
        optimizer.step()
        optimizer.zero_grad()
        record = allocator.after_step()
        if record is not None:
            moved += len(record["pruned"])
            adjusted.append(record["ranks"])
            if size > 1:
                wrap_again(wrapped)
        if size > 1:
            loss = loss.detach()
            dist.all_reduce(loss)
        losses.append(float(loss.detach()) / size)
    ranks, steps_of = allocator.ranks, [record["step"] for record in allocator.history]
    allocator.release()
    return {"losses": losses, "ranks": ranks, "moved": moved, "adjusted": adjusted, "steps": steps_of}


def parity(device: str) -> list[dict[str, Any]]:
    """The device against the CPU in float32: losses step by step, and the layers whose rank is another at the end.

    A rounding may decide between two triples that are worth the same. From there on these are two models, so that the
    losses are held to the tolerance up to that step.
    """
    rows = []
    reference = trained("cpu", torch.float32)
    for name, tolerance in TOLERANCES.items():
        found = trained(device, getattr(torch, name))
        pairs = list(zip(found["losses"], reference["losses"], strict=True))
        adjustments = zip(found["steps"], found["adjusted"], reference["adjusted"], strict=True)
        parted = next((step for step, ours, theirs in adjustments if ours != theirs), len(pairs))
        apart = [abs(a - b) / abs(b) for a, b in pairs]
        difference = max(apart[:parted])
        others = sum(found["ranks"][layer] != rank for layer, rank in reference["ranks"].items())
        rows.append(
            {
                "dtype": name,
                "same_ranks_for_steps": parted,
                "largest_difference": difference,
                "over_all_steps": max(apart),
                "tolerance": tolerance,
                "within": difference <= tolerance,
                "moved": found["moved"],
                "layers_of_another_rank": others,
                "layers": len(found["ranks"]),
            }
        )
    return rows


def step(given: Any, device: str) -> list[dict[str, Any]]:
    """Run `benchmarks.step`."""
    rows = []
    for dtype in ("float32", "bfloat16") if device == "cuda" else ("float32",):
        timing = Timing(rounds=given.rounds, batch=given.batch, length=given.length, dtype=dtype, device=device)
        rows += bench_step([given.model], ("lora", "dora", "adalora", "pedyra"), timing)
    return rows


def processes(device: str, count: int) -> dict[str, Any]:
    """As many processes on parts of every batch, over NCCL (gloo on a CPU), against one on the whole."""
    if count < 2:
        return {"not_run": "one device"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__]
    command += ["--worker", *(["--cpu"] if device == "cpu" else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env={**os.environ})
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-2000:])
    several = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    alone = trained(device, torch.float32)
    pairs = zip(several["losses"], alone["losses"], strict=True)
    return {
        "processes": count,
        "largest_difference": max(abs(a - b) / abs(b) for a, b in pairs),
        "same_ranks": several["ranks"] == alone["ranks"],
        "moved": several["moved"],
    }


def worker(device: str) -> dict[str, Any]:
    """One of the processes; the first prints what all of them have."""
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank)
    found = trained(device, torch.float32, rank=rank, size=size)
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """The same to read."""
    lines = ["# pedyra on this machine", ""]
    lines += [f"{name}: {value}  " for name, value in {**report["machine"], "model": report["model"]}.items()]
    titles = {"parity": "The device against the CPU in float32", "step": "A training step"}
    shown = {
        "step": ("model", "variant", "dtype", "ratio_to_lora", "step_seconds", "peak_bytes", "adjustment_seconds"),
    }
    for name in ("parity", "step", "processes"):
        found = report.get(name)
        if found is None:
            continue
        rows = found if isinstance(found, list) else [found]
        columns = list(shown.get(name, ())) if isinstance(found, list) else []
        columns = columns or list(dict.fromkeys(key for row in rows for key in row))
        lines += ["", f"## {titles.get(name, 'Several processes')}", "", f"| {' | '.join(columns)} |"]
        lines += ["|" + " --- |" * len(columns)]
        lines += [f"| {' | '.join(cell(row.get(column)) for column in columns)} |" for row in rows]
    return "\n".join([*lines, ""])


def cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    main()

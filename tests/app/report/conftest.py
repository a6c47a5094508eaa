"""Run folders made by arithmetic: what a 36-layer run with 20 adjustments writes, and a plain LoRA run beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

TYPES = ("query", "key", "value", "attn_output", "intermediate", "output")
STEPS, ADJUSTMENTS = 400, range(50, 250, 10)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_common(folder: Path, method: str, accuracy: float) -> Path:
    """Recipe, environment and metrics: the three files that every run has."""
    folder.mkdir(parents=True)
    recipe = {
        "name": folder.name,
        "method": method,
        "model": {"name": "minilm", "quantization": "none"},
        "data": {"source": "reviews", "kind": "classification"},
        "lora": {"r": 8, "alpha": 16},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps({"seed": 0, "device": "cpu"}), encoding="utf-8")
    metrics: list[dict[str, Any]] = []
    for step in range(5, STEPS + 1, 5):
        metrics.append({"step": step, "loss": 0.36 + 20 / (50 + step)})
        if step % 50 == 0:
            metrics.append({"step": step, "eval_loss": 0.4 + 20 / (50 + step), "eval_accuracy": 0.8 - 5 / step})
    final = {"step": STEPS, "final": True, "seconds": 124.0, "train_steps_per_second": 3.2}
    final |= {"peak_memory_bytes": 1_432_000_000, "trainable_parameters": 812_162}
    write_lines(folder / "metrics.jsonl", [*metrics, {**final, "metric": "accuracy", "value": accuracy}])
    return folder


def make_dynamic_run(folder: Path, depths: int = 6) -> Path:
    """A run in which every adjustment takes a rank from each of the first seven layers, and gives some to the last."""
    layers = [
        {"name": f"bert.encoder.layer.{depth}.{kind}", "type": kind, "depth": depth, "rank": 8}
        for depth in range(depths)
        for kind in TYPES
    ]
    names = [layer["name"] for layer in layers]
    ranks = dict.fromkeys(names, 8)
    states = []
    for step in range(0, STEPS + 1, 10):
        if step in ADJUSTMENTS:
            lost = [name for name in names[:7] if ranks[name] > 1]
            for place, name in enumerate(lost):
                ranks[name] -= 1
                ranks[names[-1 - place % 3]] += 1
            scores = {name: 1.0 + place for place, name in enumerate(names)}
            added = dict.fromkeys(names[-3:], 1) if lost else {}
            states.append({"kind": "adjustment", "layer_scores": scores, "pruned": [[name, 0, 0.0] for name in lost]})
            states[-1] |= {"added": added, "parameters": 1000}
            states[-1] |= {"step": step, "ranks": dict(ranks), "total_rank": sum(ranks.values())}
        effective = {name: 0.8 * rank for name, rank in ranks.items()}
        states.append({"kind": "snapshot", "step": step, "ranks": dict(ranks), "total_rank": sum(ranks.values())})
        states[-1]["effective_rank"] = effective
    write_common(folder, "pedyra", 0.822)
    header = {"kind": "layers", "layers": layers, "schedule": {"total_steps": STEPS}}
    write_lines(folder / "ranks.jsonl", [header, *states])
    return folder


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    return make_dynamic_run


@pytest.fixture(scope="session")
def dynamic_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dynamic_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA run: no ranks.jsonl."""
    return write_common(tmp_path_factory.mktemp("runs") / "lora", "lora", 0.81)


@pytest.fixture(scope="session")
def fitted_run(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain LoRA run, with a fit that has kept half of it."""
    folder = Path(shutil.copytree(lora_run, tmp_path_factory.mktemp("runs") / "fitted"))
    keys = ("rank", "parameters", "share", "measured_increase", "standard_error", "accepted")
    sizes = ((8, 1000, 1.0, None, None, None), (4, 500, 0.5, 0.02, 0.01, True), (2, 250, 0.25, 0.25, 0.02, False))
    rows = [dict(zip(keys, size, strict=True)) | {"tolerance": 0.05, "chosen": size[0] == 4} for size in sizes]
    record = {"parameters": 500, "share": 0.5, "words": "flat: 50.0% is proved", "told": "smaller     rank 4 of 8"}
    (folder / "fit").mkdir()
    write_lines(folder / "fit" / "pedyra_fit_curve.jsonl", rows)
    (folder / "fit" / "pedyra_fit.json").write_text(json.dumps(record), encoding="utf-8")
    return folder

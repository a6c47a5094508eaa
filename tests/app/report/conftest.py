"""Run folders made by arithmetic: what a 36-layer run with 20 adjustments writes, and a plain LoRA run beside it."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

TYPES = {
    "attention.self.query": (384, 384),
    "attention.self.key": (384, 384),
    "attention.self.value": (384, 384),
    "attention.output.dense": (384, 384),
    "intermediate.dense": (384, 1536),
    "output.dense": (1536, 384),
}
SHORT = ("query", "key", "value", "attn_output", "intermediate", "output")
DEPTHS, START_RANK, STEPS, LOG_EVERY = 6, 8, 400, 5
ADJUSTMENTS = list(range(50, 250, 10))


def make_layers(depths: int = DEPTHS) -> list[dict]:
    return [
        {
            "name": f"bert.encoder.layer.{depth}.{path}",
            "type": short,
            "depth": depth,
            "in_features": shape[0],
            "out_features": shape[1],
            "rank": START_RANK,
        }
        for depth in range(depths)
        for short, (path, shape) in zip(SHORT, TYPES.items(), strict=True)
    ]


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_common(folder: Path, method: str, seed: int, parameters: int, gain: float) -> None:
    """Recipe, environment and metrics: the three files that every run has."""
    folder.mkdir(parents=True)
    recipe = {
        "name": folder.name,
        "method": method,
        "output_dir": f"runs/{folder.name}",
        "seed": seed,
        "model": {"name": "minilm", "quantization": "none"},
        "data": {"source": "reviews", "kind": "classification"},
        "lora": {"r": START_RANK, "alpha": 16, "target_modules": "all-linear"},
        "training": {"max_steps": STEPS, "learning_rate": 1e-3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    environment = {"seed": seed, "device": "cpu", "threads": 2, "commit": None, "versions": {"python": "3.12.4"}}
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    noise = random.Random(seed)
    metrics = []
    for step in range(LOG_EVERY, STEPS + 1, LOG_EVERY):
        loss = 0.36 + 0.34 * math.exp(-step / (90 - 200 * gain)) + noise.gauss(0, 0.025)
        row = {"step": step, "epoch": step / STEPS, "seconds": step * 0.31, "loss": loss, "learning_rate": 1e-3}
        metrics.append(row)
        if step % 50 == 0:
            accuracy = 0.5 + (0.32 + gain) * (1 - math.exp(-step / 80)) + noise.gauss(0, 0.003)
            metrics.append(
                {"step": step, "seconds": step * 0.31, "eval_loss": loss + 0.05, "eval_accuracy": accuracy}
                | {"eval_runtime": 1.5, "eval_samples_per_second": 900.0}
            )
    final = {"step": STEPS, "final": True, "seconds": STEPS * 0.31}
    final |= {"peak_memory_bytes": 1_432_000_000, "trainable_parameters": parameters + 148_610}
    final |= {"metric": "accuracy", "value": round(0.81 + gain, 4), "eval_loss": 0.418}
    write_lines(folder / "metrics.jsonl", [*metrics, final])


def make_dynamic_run(folder: Path, seed: int = 0, depths: int = DEPTHS) -> Path:
    """A run at equal parameters: the allocator's rule on importances that grow with depth and differ by type."""
    noise = random.Random(seed)
    layers = make_layers(depths)
    names = [layer["name"] for layer in layers]
    size = {layer["name"]: layer["in_features"] + layer["out_features"] for layer in layers}
    weight = dict(zip(SHORT, (0.5, 0.4, 1.3, 1.0, 1.8, 0.9), strict=True))
    worth = {layer["name"]: weight[layer["type"]] * math.exp(1.2 * layer["depth"] / depths) for layer in layers}
    ranks = dict.fromkeys(names, START_RANK)

    def parameters() -> int:
        return sum(ranks[name] * size[name] for name in names)

    budget = parameters()
    states = [state_at(0, names, ranks, worth, parameters(), noise)]
    for step in range(LOG_EVERY, STEPS + 1, LOG_EVERY):
        if step in ADJUSTMENTS:
            scores = {name: worth[name] / ranks[name] ** 0.55 * noise.lognormvariate(0, 0.1) for name in names}
            order = sorted(names, key=lambda name: -scores[name])
            losers = [name for name in reversed(order) if ranks[name] > 1][: 1 + len(names) * (250 - step) // 1200]
            for name in losers:
                ranks[name] -= 1
            gainers = []
            for name in order[: len(losers)]:
                if parameters() + size[name] <= budget:
                    ranks[name] += 1
                    gainers.append(name)
            states.append(
                {"kind": "adjustment", "step": step, "ranks": dict(ranks), "layer_scores": scores}
                | {"scores": {}, "pruned": [[name, ranks[name], 0.01] for name in losers]}
                | {"added": dict.fromkeys(gainers, 1), "total_rank": sum(ranks.values())}
                | {"parameters": parameters(), "seconds": 0.021, "skipped_steps": 0}
            )
        states.append(state_at(step, names, ranks, worth, parameters(), noise))
    write_common(folder, "pedyra", seed, parameters(), gain=0.012)
    header = {
        "kind": "layers",
        "layers": layers,
        "budget": {"kind": "parameters", "total_rank": START_RANK * len(names), "parameters": budget},
        "schedule": {"total_steps": STEPS, "adjustments": len(ADJUSTMENTS)},
        "config": {"orth_weight": 0.1},
    }
    write_lines(folder / "ranks.jsonl", [header, *states])
    return folder


def state_at(step: int, names: list[str], ranks: dict, worth: dict, parameters: int, noise) -> dict:
    """A snapshot with values that fall or rise as those of a real run do."""
    progress = 1 - math.exp(-step / 60)

    def around(value: float) -> float:
        return value * noise.lognormvariate(0, 0.12)

    tracked = step % 25 == 0 and step > 0
    return {
        "kind": "snapshot",
        "step": step,
        "ranks": dict(ranks),
        "total_rank": sum(ranks.values()),
        "parameters": parameters,
        "effective_rank": {name: min(ranks[name], around(0.82 * ranks[name] * progress)) for name in names},
        "orthogonality": {name: [around(2.4 * math.exp(-step / 70) + 0.02), around(2.8 * progress)] for name in names},
        "grad_norms": {n: [around(0.02), around(0.4 * worth[n]), around(0.06 * worth[n])] for n in names}
        if step
        else None,
        "layer_scores": {name: worth[name] / ranks[name] ** 0.55 for name in names} if tracked else None,
        "two_thirds_log_variance": -3 - progress if tracked else None,
    }


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    return make_dynamic_run


@pytest.fixture(scope="session")
def dynamic_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dynamic_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="session")
def still_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which no rank moved."""
    folder = make_dynamic_run(tmp_path_factory.mktemp("runs") / "still")
    header, *records = map(json.loads, (folder / "ranks.jsonl").read_text().splitlines())
    start = {layer["name"]: layer["rank"] for layer in header["layers"]}
    write_lines(folder / "ranks.jsonl", [header, *({**r, "added": {}, "pruned": [], "ranks": start} for r in records)])
    return folder


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA run: no ranks.jsonl."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    write_common(folder, "lora", 0, parameters=663_552, gain=0.0)
    return folder


@pytest.fixture(scope="session")
def fitted_run(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain LoRA run, with a fit that has kept half of it."""
    folder = Path(shutil.copytree(lora_run, tmp_path_factory.mktemp("runs") / "fitted"))
    keys = ("rank", "parameters", "share", "value", "lower", "upper", "accepted", "beyond")
    sizes = (
        (8, 1000, 1.0, None, None, None, None, False),
        (4, 500, 0.5, 0.02, 0.003, 0.037, True, False),
        (2, 250, 0.25, 0.25, 0.21, 0.29, False, True),
    )
    rows = [dict(zip(keys, size, strict=True)) | {"tolerance": 0.05, "chosen": size[0] == 4} for size in sizes]
    record = {"rank": 4, "of_rank": 8, "megabytes": 0.5, "of_megabytes": 1.0, "parameters": 500, "share": 0.5}
    record |= {"tolerance": 0.05, "measure": "loss", "promise": "the loss rises by at most 1% of what fine-tuning won"}
    record |= {"verdict": "flat", "words": "flat: 50.0% of the adapter is proved to be enough for this task"}
    record |= {"metrics": {"base": {"accuracy": 0.5}, "whole": {"accuracy": 0.81}, "smaller": {"accuracy": 0.805}}}
    (folder / "fit").mkdir()
    write_lines(folder / "fit" / "pedyra_fit_curve.jsonl", rows)
    (folder / "fit" / "pedyra_fit.json").write_text(json.dumps(record), encoding="utf-8")
    return folder

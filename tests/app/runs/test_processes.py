"""Two processes of one run, started as torchrun starts them, come to what one process with their whole batch does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from closeness import same_bits
from safetensors.torch import load_file
from together import can_fork, together

from pedyra.app.runs.processes import count_processes, is_first
from pedyra.lab.cli import main
from pedyra.lora.files import read_rows

pytestmark = pytest.mark.skipif(not can_fork(), reason="forks are for Linux without an accelerator")

RECIPE: dict[str, Any] = {
    "method": {"name": "pedyra", "interval": 2, "initial_warmup": 1, "final_warmup": 3, "moves": 2},
    "model": {"name": "tiny-llama"},
    "data": {"source": "toy", "kind": "causal_lm", "prompt": "prompt", "completion": "completion", "max_length": 40},
    "lora": {"r": 2, "alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "training": {
        **{"max_steps": 8, "learning_rate": 1e-2, "logging_steps": 4, "use_cpu": True},
        **{"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4},
        "per_device_eval_batch_size": 4,
    },
}
RECIPE["data"] |= {"train_rows": 64, "eval_rows": 16}


def train(folder: Path, processes: int, *flags: str, batch: int = 4) -> list[int]:
    """`pedyra train` in so many processes, each with so many rows a step: their exit codes."""
    training = {**RECIPE["training"], "per_device_train_batch_size": batch}
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({**RECIPE, "output_dir": str(folder / "run"), "training": training})
    )
    return together(_train, processes, folder, flags)


def _train(rank: int, size: int, folder: Path, flags: tuple[str, ...]) -> int:
    log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    with pytest.raises(SystemExit) as ended:
        main(["train", str(folder / "recipe.yaml"), *flags])
    return int(ended.value.code or 0)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors")


def test_two_processes_train_as_one_write_once_and_resume(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert train(one, 1, batch=8) == [0], (one / "log0").read_text()
    assert train(two, 2) == [0, 0], (two / "log0").read_text() + (two / "log1").read_text()

    alone, together = (read_rows(folder / "run" / "metrics.jsonl") for folder in (one, two))
    assert [row["step"] for row in together] == [row["step"] for row in alone]  # one writer
    for ours, theirs in zip(together, alone, strict=True):
        for key in {"loss", "eval_loss", "eval_perplexity", "value", "trainable_parameters"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
    ours, theirs = (
        [row["ranks"] for row in read_rows(folder / "run" / "ranks.jsonl") if row["kind"] == "adjustment"]
        for folder in (two, one)
    )
    assert ours == theirs and len(ours) == 1
    assert json.loads((two / "run" / "environment.json").read_text())["processes"] == 2
    assert "held-out perplexity" in (two / "log0").read_text() and "held-out" not in (two / "log1").read_text()

    finished, kept = adapter(two), together[:-1]
    for name, tensor in adapter(one).items():
        torch.testing.assert_close(finished[name], tensor, rtol=1e-3, atol=1e-4)
    (two / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    (two / "run" / "checkpoint-8" / "rng_state_1.pth").unlink()  # as if killed while that was written
    assert train(two, 1, "--resume") == [2]
    assert "has 8 rows, and would have 4 in 1 process(es)" in (two / "log0").read_text()
    assert train(two, 2, "--resume") == [0, 0], (two / "log0").read_text() + (two / "log1").read_text()
    assert (
        "continuing from" in (two / "log0").read_text() and "rng_state_1.pth is missing" in (two / "log0").read_text()
    )
    assert all(same_bits(tensor, finished[name]) for name, tensor in adapter(two).items())


def test_a_world_size_that_no_launcher_set_is_one_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert (count_processes(), is_first()) == (1, True)
    for key, value in (("LOCAL_RANK", "1"), ("RANK", "1")):
        monkeypatch.setenv(key, value)
    assert (count_processes(), is_first()) == (2, False)

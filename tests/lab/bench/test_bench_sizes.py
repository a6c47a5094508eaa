"""A trained LoRA cut to the sizes of smaller ones, against those."""

from __future__ import annotations

import pytest
from rich.console import Console

from pedyra.lab.bench.sizes import bench_sizes
from pedyra.lab.compare.compare import compare_grid
from pedyra.lab.compare.grid import check_grid

GRID = {
    "name": "tiny",
    "model": {"name": "tiny-bert"},
    "lora": {"r": 2, "alpha": 8},
    "training": {"max_steps": 20, "per_device_train_batch_size": 16, "save_strategy": "no", "use_cpu": True},
    "methods": ["lora"],
    "tasks": {"toy": {"max_length": 40, "train_rows": 128, "eval_rows": 64}},
    "seeds": [0],
    "judge": "loss",
}


def test_the_larger_lora_is_cut_to_the_size_of_the_smaller(tmp_path):
    settings = {"output_dir": str(tmp_path), "budgets": [1, 2], "learning_rates": [0.003, 0.01]}
    comparison = compare_grid(check_grid(GRID | settings, "tiny"), 1, Console(quiet=True))
    seconds = {row["budget"]: row["seconds"] for row in comparison.rows}
    cut, recovered = bench_sizes(tmp_path, recoveries=(0, 4))
    for row in (cut, recovered):
        assert (row["rank"], row["smaller_rank"]) == (2, 1)
        assert 0.9 * row["lora_parameters"] <= row["parameters"] <= row["lora_parameters"]
        assert row["lora_less_cut"] == pytest.approx(row["lora_loss"] - row["loss"], abs=1e-9)
        assert row["training_seconds"] == seconds[2]
        assert row["sweep_seconds"] > seconds[1]
    assert cut["lora_loss"] == recovered["lora_loss"] and cut["loss"] != recovered["loss"]


def test_one_rank_alone_is_refused(tmp_path):
    settings = {"output_dir": str(tmp_path), "learning_rates": [0.01]}
    compare_grid(check_grid(GRID | settings, "tiny"), 1, Console(quiet=True))
    with pytest.raises(ValueError, match="has LoRAs of 1 ranks, and it takes two"):
        next(bench_sizes(tmp_path))

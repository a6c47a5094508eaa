"""A trained LoRA cut to the sizes of smaller ones, against those."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.sizes import SIZES_KEY, bench_sizes
from pedyra.app.recipe import Recipe
from pedyra.app.runs.run import train_run
from pedyra.lora.files import append_row


def row(run: Path, rank: int, seconds: float, **others: Any) -> dict[str, Any]:
    """As a comparison keeps it."""
    known = {"method": "lora", "task": "toy", "seed": 0, "learning_rate": 0.01}
    return {**known, "budget": rank, "seconds": seconds, "run": str(run), **others}


def train(out: Path, rank: int, **data: Any) -> None:
    recipe = {
        "name": "tiny", "output_dir": str(out), "method": "lora", "model": {"name": "tiny-bert"},
        "data": {"source": "toy", "max_length": 40, "train_rows": 128, "eval_rows": 64} | data,
        "lora": {"r": rank, "alpha": 4 * rank},
        "training": {"max_steps": 20, "per_device_train_batch_size": 16, "learning_rate": 0.01,
                     "save_strategy": "no", "use_cpu": True},
    }  # fmt: skip
    train_run(Recipe.model_validate(recipe), console=Console(quiet=True))


def test_the_larger_lora_is_cut_to_the_size_of_the_smaller(tmp_path):
    for rank in (1, 2):
        train(tmp_path / f"r{rank}", rank)
        append_row(tmp_path / "comparison.jsonl", row(tmp_path / f"r{rank}", rank, 10.0 * rank))
        append_row(tmp_path / "tuning.jsonl", row(tmp_path, rank, 7.0, seed=1000))
    cut, recovered = bench_sizes(tmp_path, recoveries=(0, 4))
    for found in (cut, recovered):
        assert (found["rank"], found["smaller_rank"]) == (2, 1)
        assert 0.9 * found["lora_parameters"] <= found["parameters"] <= found["lora_parameters"]
        assert found["lora_less_cut"] == pytest.approx(found["lora_loss"] - found["loss"], abs=1e-9)
        assert found["training_seconds"] == 20
        assert found["sweep_seconds"] == 17
        assert set(SIZES_KEY) <= found.keys()
    assert cut["lora_loss"] == recovered["lora_loss"] and cut["loss"] != recovered["loss"]


def test_a_comparison_may_have_been_moved(tmp_path):
    """Its rows name their runs from its folder on, and a run's recipe names the rows where they were."""
    before, data = tmp_path / "before", tmp_path / "before/data/toy"
    data.mkdir(parents=True)
    for name, count in (("train", 48), ("reported", 24)):
        lines = (json.dumps({"text": f"{name} {i}", "label": i % 2}) + "\n" for i in range(count))
        (data / f"{name}.jsonl").write_text("".join(lines))
    files = {"source": str(data / "train.jsonl"), "validation": str(data / "reported.jsonl")}
    for rank in (1, 2):
        train(before / f"r{rank}", rank, **files)
        append_row(before / "comparison.jsonl", row(Path(f"r{rank}"), rank, 10.0))
    before.rename(tmp_path / "after")
    (found,) = bench_sizes(tmp_path / "after", recoveries=(0,))
    assert (found["rank"], found["smaller_rank"]) == (2, 1)


def test_one_rank_alone_is_refused(tmp_path):
    append_row(tmp_path / "comparison.jsonl", row(tmp_path, 8, 1.0))
    with pytest.raises(ValueError, match="has LoRAs of 1 ranks, and it takes two"):
        next(bench_sizes(tmp_path))


def test_a_folder_of_no_comparison_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no comparison\.jsonl"):
        next(bench_sizes(tmp_path))

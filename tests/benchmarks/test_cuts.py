"""Ways to cut an adapter to one size, against what each is by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.bound import bench_bound
from pedyra.fitting.curve import Ladder
from rich.console import Console
from torch import Tensor

from benchmarks.cuts import CUTS_KEY, bench_cuts, ways
from benchmarks.forgetting import bench_forgetting
from pedyra.app.recipe import Recipe
from pedyra.app.runs.run import train_run
from pedyra.fitting.calibration import calibrate, lora_layers
from pedyra.fitting.judge import Judge
from pedyra.fitting.wanted import Shape
from pedyra.lora.files import SUMS

WAYS = ["fit", "singular values", "energy", "inputs", "random"]


@pytest.fixture
def model(trained_bert: Any) -> Any:
    return trained_bert


@pytest.fixture
def found(model: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(3):
        ids = torch.randint(3, 40, (6, 6), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids[:, 0] > 20).long()})
    return {way: calibration for way, _, calibration in ways(model, calibrate(Judge(model), batches))}


def singular_values(model: Any) -> dict[str, Tensor]:
    updates = {name: layer.get_delta_weight("default").detach() for name, layer in lora_layers(model).items()}
    return {name: torch.linalg.svdvals(update.double())[:4] for name, update in updates.items()}


def kept(calibration: Any, share: float) -> dict[str, int]:
    ladder = Ladder(calibration, Shape())
    return ladder.point(ladder.at(share)).ranks


def test_singular_values_go_by_their_squares_per_parameter(model, found):
    ranks, values = kept(found["singular values"], 0.4), singular_values(model)
    sizes = {name: layer.parameters for name, layer in found["fit"].layers.items()}
    stay = [float(s**2 / sizes[name]) for name in ranks for s in values[name][: ranks[name]]]
    go = [float(s**2 / sizes[name]) for name in ranks for s in values[name][ranks[name] :]]
    assert 0 < len(stay) < len(go) * 2 and min(stay) >= max(go) * (1 - 1e-6)


def test_energy_keeps_what_one_threshold_keeps_in_every_layer(model, found):
    ranks, values = kept(found["energy"], 0.6), singular_values(model)
    lost = {name: [float((s[k:] ** 2).sum() / (s**2).sum()) for k in range(5)] for name, s in values.items()}
    threshold = max(lost[name][rank] for name, rank in ranks.items())  # of what the kept ones lose
    assert all(rank == 0 or lost[name][rank - 1] >= threshold - 1e-6 for name, rank in ranks.items())


def test_every_way_leaves_the_update_where_nothing_is_cut(model, found):
    for calibration in found.values():
        for layer in calibration.layers.values():
            identity = layer.basis.inverse @ layer.basis.T
            torch.testing.assert_close(identity, torch.eye(4).double(), atol=1e-6, rtol=0)
    assert list(found) == WAYS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a LoRA."""
    out = tmp_path_factory.mktemp("runs") / "run"
    recipe = {
        "name": "tiny", "output_dir": str(out), "method": "lora", "model": {"name": "tiny-bert"},
        "data": {"source": "toy", "max_length": 40, "train_rows": 64, "eval_rows": 64}, "lora": {"r": 2},
        "training": {"max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "no", "use_cpu": True},
    }  # fmt: skip
    train_run(Recipe.model_validate(recipe), console=Console(quiet=True))
    return out


def test_a_run_is_cut_in_every_way_to_the_same_size(run):
    rows = list(bench_cuts([run], [1.0, 0.5], rows=32))
    assert [row["way"] for row in rows[::2]] == [*WAYS, "random", "random"]
    assert len({tuple(row[field] for field in CUTS_KEY) for row in rows}) == len(rows)
    assert all(row["increase"] == pytest.approx(0, abs=1e-6) and row["share"] == 1 for row in rows[::2])
    assert all(0.3 < row["share"] <= 0.5 for row in rows[1::2])


def test_every_run_is_checked_before_the_first_is_measured(run, tmp_path, monkeypatch):
    other = tmp_path / "adalora"
    shutil.copytree(run, other)
    (other / "adapter" / SUMS).unlink()  # which would tell that it was changed
    config = other / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "ADALORA"}))
    for module, bench in (("cuts", bench_cuts), ("bound", bench_bound)):
        monkeypatch.setattr(f"benchmarks.{module}.TrainedLora", lambda *a, **k: pytest.fail("measured"))
        with pytest.raises(ValueError, match=r"/adalora has an adapter of type ADALORA, and what is cut is a LoRA"):
            next(bench([run, other]))
    with pytest.raises(ValueError, match=r"/run is of data.kind classification, and general text is for a model that"):
        next(bench_forgetting([run], ["some text"] * 32))


@pytest.mark.parametrize(("shares", "message"), [([0.5, 2.0], "--share is 2.0"), ([0.5], "is no run folder")])
def test_what_cannot_be_cut_is_told_first(shares, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        next(bench_cuts([tmp_path], shares))

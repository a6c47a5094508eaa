"""Ways to cut an adapter to one rank, against what each is by hand; and whether fits are right on fresh rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.answers import bench_answers
from benchmarks.cuts import CUTS_KEY, bench_cuts
from benchmarks.fresh import bench_fresh, summary
from pedyra.app.recipe import Recipe
from pedyra.app.runs.run import train_run
from pedyra.fitting.calibration import calibrate, lora_layers
from pedyra.fitting.choice import by_singular_values
from pedyra.fitting.cut import cut
from pedyra.fitting.judge import Judge
from pedyra.lora.files import SUMS

WAYS = ["fit", "calibrated", "singular values", "singular values, repaired"]


@pytest.mark.parametrize("rank", [1, 3])
def test_the_first_singular_values_are_those_of_the_dense_update(trained_bert: Any, rank: int):
    generator, batches = torch.Generator().manual_seed(1), []
    for _ in range(3):
        ids = torch.randint(3, 40, (6, 6), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids[:, 0] > 20).long()})
    measured = calibrate(Judge(trained_bert), batches)
    found = by_singular_values(trained_bert, measured)
    for name, module in lora_layers(trained_bert).items():
        A, B = (slot["default"].weight.detach() for slot in (module.lora_A, module.lora_B))
        U, values, V = torch.linalg.svd(B @ A)
        rows, columns = cut(A, B, found.layers[name].basis, torch.eye(rank).double())
        expected = U[:, :rank] * values[:rank] @ V[:rank]
        torch.testing.assert_close(columns @ rows, expected, rtol=1e-3, atol=1e-4 * float(values[0]))
        # The same sums of the same batches, in another basis: a slope of the whole is the sum over any of its bases.
        slopes = [each.layers[name].slopes.sum(1) for each in (measured, found)]
        torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-6)


def trained(out: Path, **data: Any) -> Path:
    """A finished run of a LoRA."""
    recipe = {
        "name": "tiny", "output_dir": str(out), "method": "lora", "model": {"name": "tiny-bert"},
        "data": {"source": "toy", "max_length": 40, "train_rows": 64, "eval_rows": 64, **data}, "lora": {"r": 2},
        "training": {"max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "no", "use_cpu": True},
    }  # fmt: skip
    train_run(Recipe.model_validate(recipe), console=Console(quiet=True))
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "run")


def test_a_run_is_cut_in_every_way_to_the_same_size(run: Path):
    rows = list(bench_cuts([run], [2, 1], others=[run], rows=32))
    assert [row["way"] for row in rows] == [*WAYS, *WAYS, "from the start"]
    assert len({tuple(row[field] for field in CUTS_KEY) for row in rows}) == len(rows)
    assert len({row["parameters"] for row in rows[:4]}) == len({row["parameters"] for row in rows[4:8]}) == 1
    assert all(row["increase"] == pytest.approx(0, abs=1e-6) for row in (*rows[:4], rows[-1]))  # nothing is cut
    assert rows[0]["parameters"] == 2 * rows[4]["parameters"]


def test_every_run_is_checked_before_the_first_is_measured(run: Path, tmp_path: Path, monkeypatch: Any):
    other = tmp_path / "adalora"
    shutil.copytree(run, other)
    (other / "adapter" / SUMS).unlink()  # which would tell that it was changed
    config = other / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "ADALORA"}))
    monkeypatch.setattr("benchmarks.cuts.TrainedLora", lambda *a, **k: pytest.fail("measured"))
    for where, message in ((other, "has an adapter of type ADALORA"), (tmp_path, "is no run folder")):
        with pytest.raises(ValueError, match=message):
            next(bench_cuts([run, where]))


def test_fits_of_fresh_rows_are_compared_with_the_truth_on_others(tmp_path: Path):
    rows = [{"text": f"a film of {number} minutes that is {word}", "label": word == "good"}
            for number in range(400) for word in ("good", "bad")]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({**row, "label": int(row["label"])}) + "\n" for row in rows)
    )
    run = trained(tmp_path / "run", source=str(tmp_path / "rows.jsonl"))
    found = list(bench_fresh(run, fits=2, rows=192, truth=64))
    assert [row["fit"] for row in found] == [0, 1] and all(row["of"] == 2 and row["truth"] == 64 for row in found)
    whole = [row["measured"] is None for row in found]
    assert all((row["true"] == 0) == is_whole for row, is_whole in zip(found, whole, strict=True))
    assert not any(row["beyond"] and not row["beyond_as_measured"] for row in found)
    with pytest.raises(ValueError, match="rows that it was not trained on, and it takes 2048"):
        next(bench_fresh(run, rows=512, truth=1024))


def test_a_fit_without_labels_is_compared_with_the_truth_on_others(tmp_path: Path):
    rows = [{"text": f"a film of {number} minutes that is {word}", "label": int(word == "good")}
            for number in range(300) for word in ("good", "bad")]  # fmt: skip
    run = trained(tmp_path / "run")
    found = list(bench_answers(run, rows, [160], 1, 300, labelled=True))
    assert [row["asked"] for row in found] == [
        "changed 5%",
        "changed 2%",
        "changed 1%",
        "tolerance 1pt",
        "tolerance 1%",
    ]
    for row in found:
        assert (row["share"] == 1) <= (row["true_changed"] == row["true_fall"] == 0)
        assert abs(row["true_fall"]) <= row["true_changed"] + 1e-9  # an accuracy falls by no more than answers change
        assert (row["beyond"] is None) == row["asked"].startswith("tolerance")
    with pytest.raises(ValueError, match="there are 600 rows, and 500 of the truth and 160 for a fit"):
        next(bench_answers(run, rows, [160], 1, 500, labelled=False))


@pytest.mark.parametrize(
    ("count", "every", "low", "high"),
    [
        (0, 40, 0.0, 1 - 0.025 ** (1 / 40)),
        (40, 40, 0.025 ** (1 / 40), 1.0),
        (1, 20, 0.0013, 0.2487),  # Clopper and Pearson's, as tables have it
        (5, 100, 0.0164, 0.1128),
    ],
)
def test_how_many_are_beyond_is_told_with_the_exact_interval(count: int, every: int, low: float, high: float):
    row = {"beyond": False, "beyond_as_measured": False, "covered": True}
    rows = [{**row, "beyond": number < count} for number in range(every)]
    first, second, covered = summary(rows).splitlines()
    assert first.startswith(f"{count} of {every} ") and f"[{low:.1%}, {high:.1%}]" in first
    assert second.startswith(f"0 of {every} ") and covered.startswith(f"{every} of {every} ")

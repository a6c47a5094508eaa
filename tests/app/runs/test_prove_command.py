"""`pedyra prove` as a user runs it: what is made of a run's adapter beside the adapter itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from pedyra.app.runs.export import export_folder
from pedyra.app.tasks.toy import toy
from pedyra.lab.cli import main

RECIPE = {
    "model": {"name": "tiny-bert"},
    "method": "lora",
    "data": {"source": "toy", "max_length": 40, "train_rows": 64, "eval_rows": 64, "validation_fraction": 0.25},
    "lora": {"r": 3},
    "training": {"max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True,
                 "eval_strategy": "no"},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short LoRA run."""
    folder = tmp_path_factory.mktemp("prove")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "output_dir": str(folder / "run")}))
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(folder / "recipe.yaml")])
    assert not stopped.value.code
    return folder / "run"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[int, str, dict[str, Any]]]:
    """call(*arguments): exit code, what was printed, and the row of `pedyra prove`."""

    def prove(*arguments: Any) -> tuple[int, str, dict[str, Any]]:
        file = tmp_path / "proof.jsonl"
        file.unlink(missing_ok=True)
        with pytest.raises(SystemExit) as stopped:
            main(["prove", *map(str, arguments), "--json", str(file)])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out + err, json.loads(file.read_text()) if file.is_file() else {}

    return prove


def changed(run: Path, out: Path, factor: float, key: str = "lora_B") -> Path:
    """A copy of the run's adapter with some of its factors multiplied."""
    shutil.copytree(run / "adapter", out, ignore=shutil.ignore_patterns("SHA256SUMS"))
    file = out / "adapter_model.safetensors"
    tensors = {name: value * factor if key in name else value for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return out


def test_exit_codes_say_no_worse_worse_and_cannot_tell(run: Path, call: Any, tmp_path: Path):
    code, out, row = call(run, run / "adapter", "--margin", "0.01 loss")
    assert code == 0 and out.startswith("no worse"), out
    assert row["verdict"] == "no worse" and row["rows"] >= 32 and row["metric"] == "accuracy"
    code, out, row = call(run, changed(run, tmp_path / "turned", -3.0), "--margin", "0.01 loss")
    assert code == 1 and out.startswith("worse"), out
    assert row["lower"] > row["margin"] == 0.01
    code, out, row = call(run, changed(run, tmp_path / "near", 0.97), "--margin", "0.1pt")
    assert code == 3 and out.startswith("cannot tell"), out
    assert row["measure"] == "accuracy" and row["enough"] > row["rows"]


def test_merged_and_quantised_models_and_the_base_are_taken(run: Path, call: Any, tmp_path: Path):
    export_folder(run, "merged", tmp_path / "merged")
    code, out, row = call(run, tmp_path / "merged", "--margin", "0.001 loss")
    assert code == 0 and row["difference"] == pytest.approx(0, abs=1e-4), out
    code, out, row = call("base", run, "--margin", "0.01 loss")
    assert code == 0 and row["difference"] < 0, out
    pytest.importorskip("bitsandbytes")
    _, out, row = call(run, run, "--quantization-b", "nf4", "--margin", "0.05 loss")
    assert 0 < abs(row["difference"]) < 1, out
    _, out, row = call("base", tmp_path / "merged", "--run", run, "--quantization-b", "nf4", "--margin", "0.05 loss")
    assert row["difference"] < 0, out


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of 80 rows."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({key: row[key] for key in ("text", "label")}) + "\n" for row in toy()[:80]))
    return file


def test_what_was_won_counts_no_random_head_where_a_run_has_rows_to_fit_one(run: Path, call: Any, rows: Path):
    _, out, _ = call(run, run / "adapter", "--margin", "1%")
    assert "over the base model with a linear head fitted to it" in out
    _, out, _ = call(run, run / "adapter", "--margin", "1%", "--data", rows)
    assert "over the base model, whose head is untrained" in out


def test_a_lora_that_another_tool_made_is_proved_on_a_file_of_rows(run: Path, call: Any, rows: Path, tmp_path: Path):
    small = tmp_path / "small"
    shutil.copytree(run / "adapter", small, ignore=shutil.ignore_patterns("SHA256SUMS"))
    file = small / "adapter_model.safetensors"
    cut = {
        name: value[:2].contiguous() if "lora_A" in name else value[:, :2].contiguous() if "lora_B" in name else value
        for name, value in load_file(file).items()
    }
    save_file(cut, file, metadata={"format": "pt"})
    config = json.loads((small / "adapter_config.json").read_text())
    config |= {"r": 2, "lora_alpha": config["lora_alpha"] * 2 / 3, "rank_pattern": {}, "alpha_pattern": {}}
    (small / "adapter_config.json").write_text(json.dumps(config))
    code, out, row = call(run, small, "--data", rows, "--margin", "5 loss")
    assert code == 0 and row["rows"] == 80 and row["difference"] != 0, out


def test_mistakes_are_one_line(run: Path, call: Any, tmp_path: Path):
    other = changed(run, tmp_path / "other", 1.0)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "another/base"}))
    own = changed(run, tmp_path / "own", 1.0)
    (own / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "one/base"}))
    for told, arguments in [
        ("A is an adapter of the base", (own, other, "--run", run)),
        ("margin is", (run, run, "--margin", "half")),
        ("A is the base", ("base", run, "--margin", "1%")),
        ("is no folder", (run, tmp_path / "nothing")),
        ("give --run RUN", ("base", "base", "--margin", "0.1 loss")),
        ("takes no base", (run, _model_folder(tmp_path), "--base-b", "x")),
    ]:
        code, out, _ = call(*arguments)
        assert code == 2 and told in out and len(out.strip().splitlines()) == 1, (arguments, out)


def _model_folder(tmp_path: Path) -> Path:
    """Make what looks like a whole model."""
    folder = tmp_path / "whole"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder

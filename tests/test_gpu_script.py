"""The script of `make gpu` on the CPU and a tiny model: every part measures, and both files are written."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "gpu.py"


def test_every_part_is_measured_on_a_cpu(tmp_path: Path):
    main = runpy.run_path(str(SCRIPT))["main"]
    size = ["--rounds", "8", "--batch", "4", "--length", "24"]
    report = main(["--cpu", "--model", "llama-32x1", *size, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "gpu.json").read_text()) == report
    exact = next(row for row in report["parity"] if row["dtype"] == "float32")
    assert exact["over_all_steps"] == 0 and exact["layers_of_another_rank"] == 0  # the CPU against itself
    assert exact["same_ranks_for_steps"] == 24
    assert all(row["within"] and row["moved"] > 0 for row in report["parity"])
    assert [row["variant"] for row in report["step"]] == ["lora", "dora", "adalora", "pedyra"]
    assert all(row["step_seconds"] > 0 and row["peak_bytes"] > 0 for row in report["step"])
    assert report["processes"] == {"not_run": "one device"}
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("\n## ") == 3 and "failed" not in text


@pytest.mark.parametrize("name", ["opt-125m", "llama-33x1"])
def test_a_model_that_cannot_be_measured_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], name):
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT))["main"](["--cpu", "--model", name, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2 and name in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_without_a_gpu_it_says_so_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT))["main"](["--out", str(tmp_path)])
    assert stopped.value.code == 2 and "--cpu" in capsys.readouterr().err

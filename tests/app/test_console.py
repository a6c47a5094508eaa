"""What is printed and written for scripts."""

import json
from io import StringIO

import pytest
from rich.console import Console

from pedyra.app.console import (
    _adjustments_line,
    format_bytes,
    format_seconds,
    new_console,
    print_rank_map,
    print_table,
    write_json_lines,
)
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
        ["q", "3", "12", "1"],
        ["v", ".", "0", "."],
        ["pooler", "7", ".", "."],
    ]


def test_json_lines_hold_no_nan(tmp_path):
    write_json_lines(
        tmp_path / "rows.jsonl", [{"metric": "loss", "value": float("nan")}, {"metric": "f1", "value": 0.5}]
    )
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["value"] for line in lines] == [None, 0.5]
    assert "NaN" not in lines[0]


def test_sizes_and_times_for_people():
    assert [format_bytes(count) for count in (12, 1536, 3 * 1024**3)] == ["12 B", "1.5 KiB", "3.0 GiB"]
    assert [format_seconds(s) for s in (4.26, 95, 7260)] == ["4.3 s", "1 min 35 s", "2 h 1 min"]


@pytest.mark.parametrize(
    ("budget", "moves", "told"),
    [
        ("ranks", 12, "3 after steps 10 to 30, every 10; up to about 12 triples move in one"),
        ("fit", 96, "3 after steps 10 to 30, every 10, at which directions may be cut"),
        ("fit", 0, "3 after steps 10 to 30, every 10, at which ranks stay as they are"),
    ],
)
def test_a_plan_tells_what_its_adjustments_do(budget: str, moves: int, told: str):
    assert _adjustments_line({"adjustments": [10, 20, 30], "interval": 10, "moves": moves}, budget) == told


def test_a_deep_model_is_mapped_in_bands_that_fit_the_width():
    layers = [{"layer": f"layers.{depth}.q", "rank": 8} for depth in range(30)]
    screen = StringIO()
    print_rank_map(Console(file=screen, width=60), layers)
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 60
    headers = [line.split()[3:] for line in lines if line.startswith("rank by depth")]
    assert [int(depth) for header in headers for depth in header] == list(range(30)) and len(headers) > 1


def test_a_table_in_a_pipe_is_never_folded():
    columns, row = ["variant", *(f"a_rather_long_title_{i}" for i in range(8))], ["pedyra", *range(10**8, 10**8 + 8)]
    piped, terminal = StringIO(), StringIO()
    print_table(Console(file=piped, width=80), columns, [row])
    print_table(Console(file=terminal, width=80, force_terminal=True), columns, [row])
    header, line = piped.getvalue().splitlines()
    assert header.split() == columns and line.split() == ["pedyra", *(f"{value:,}" for value in row[1:])]
    assert len(terminal.getvalue().splitlines()) > 2  # 80 columns are too few for it


def test_a_method_without_lora_layers_has_no_map():
    out = StringIO()
    print_rank_map(Console(file=out), [])
    assert out.getvalue() == ""


def test_brackets_in_paths_are_no_markup(capsys: pytest.CaptureFixture[str]):
    new_console().print("written to runs/a[lr=3]/[/b]")
    print_table(new_console(), ["layer"], [["a[seed]"]])
    assert "runs/a[lr=3]/[/b]" in capsys.readouterr().out

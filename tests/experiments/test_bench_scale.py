"""`pedyra bench scale`: its rows and its fit. No time is asserted but one, that 500 layers stay far from slow."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from pedyra.cli import app
from pedyra.experiments.bench_scale import MEASURES, growth, operation_seconds


def test_smoke_writes_sizes_fits_and_operations(tmp_path):
    file = tmp_path / "rows.jsonl"
    result = CliRunner().invoke(app, ["bench", "scale", "--smoke", "--threads", "1", "--json", str(file)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    sizes = [row for row in rows if row["kind"] == "size"]
    assert [(row["axis"], row["value"], row["triples"]) for row in sizes] == [
        ("layers", 4, 32), ("layers", 8, 64), ("rank", 2, 8), ("rank", 4, 16),
    ]  # fmt: skip
    assert all(row[measure] > 0 for row in sizes for measure in MEASURES)
    assert len([row for row in rows if row["kind"] == "fit"]) == 2 * len(MEASURES)
    assert [row["layers"] for row in rows if row["kind"] == "operations"] == [16]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_growth_is_the_exponent_of_a_power_law(exponent):
    sizes = [3, 10, 40, 100]
    assert growth(sizes, [0.01 * size**exponent for size in sizes]) == pytest.approx(exponent, abs=1e-9)


def test_operations_on_500_layers_take_no_time_to_speak_of():
    # Each takes 0.1 to 0.4 s on one slow core; what a quadratic loop would cost is many times the bound.
    assert all(seconds < 10 for seconds in operation_seconds(500).values())

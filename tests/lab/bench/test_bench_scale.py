"""`pedyra bench scale`: its rows and its fit. No time is asserted but one, that 200 layers stay far from slow."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from pedyra.lab.bench import scale
from pedyra.lab.bench.rows import SCALE_KEY, SCALE_KEY_OF_SOME
from pedyra.lab.bench.scale import MEASURES, ChainSize, growth, operation_seconds
from pedyra.lab.cli import app


def test_smoke_writes_sizes_fits_and_operations(tmp_path):
    file = tmp_path / "rows.jsonl"
    result = CliRunner().invoke(app, ["bench", "scale", "--smoke", "--threads", "1", "--json", str(file)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    sizes = [row for row in rows if row["kind"] == "size"]
    assert [(row["axis"], row["value"], row["triples"]) for row in sizes] == [
        ("layers", 4, 32), ("layers", 8, 64), ("rank", 2, 8), ("rank", 4, 16),
    ]  # fmt: skip
    assert all(row[measure] > 0 or measure == "measuring_seconds" for row in sizes for measure in MEASURES)
    fits = [row for row in rows if row["kind"] == "fit"]
    assert [(row["axis"], row["measure"]) for row in fits] == [(a, m) for a in ("layers", "rank") for m in MEASURES]
    assert [row["layers"] for row in rows if row["kind"] == "operations"] == [16]
    ids = {json.dumps([row.get(field) for field in (*SCALE_KEY, *SCALE_KEY_OF_SOME)]) for row in rows}
    assert len(ids) == len(rows)


@pytest.mark.parametrize("command", ["scale", "step"])
@pytest.mark.parametrize("threads", ["0", "-1"])
def test_threads_that_are_none_are_refused(command: str, threads: str):
    result = CliRunner().invoke(app, ["bench", command, "--smoke", "--threads", threads])
    assert result.exit_code == 2 and "'--threads': Input should be greater than or equal to 1" in result.output


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_growth_is_the_exponent_of_a_power_law(exponent):
    sizes = [3, 10, 40, 100]
    assert growth(sizes, [0.01 * size**exponent for size in sizes]) == pytest.approx(exponent, abs=1e-9)


def test_a_cost_that_grows_as_it_should_is_found_in_the_medians(monkeypatch):
    costs = iter([1.0, 2.0, 1.0, 2.0, 1.0, 50.0])  # three repeats of two sizes, one of them disturbed
    monkeypatch.setattr(scale, "measure", lambda size, **_: dict.fromkeys(MEASURES, next(costs)))
    axes = {"layers": (ChainSize(layers=2), ChainSize(layers=4))}
    rows = list(scale.bench_scale(axes, operations=2))
    assert [row["step_seconds"] for row in rows[:2]] == [1.0, 2.0]
    assert [row["exponent"] for row in rows[2:-1]] == pytest.approx([1.0] * len(MEASURES))


def test_operations_on_200_layers_take_no_time_to_speak_of():
    # Each takes 0.05 to 0.4 s on one slow core; what a quadratic loop would cost is many times the bound.
    seconds = operation_seconds(200)
    assert {"attach_seconds", "checkpoint_seconds", "export_seconds", "load_seconds", "resume_seconds"} <= set(seconds)
    assert all(taken < 5 for taken in seconds.values())

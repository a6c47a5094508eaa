"""The command lines of the benchmarks: what is refused, and in one line."""

from __future__ import annotations

import pytest

from benchmarks.cuts import cuts
from benchmarks.fresh import fresh
from benchmarks.planted import planted
from benchmarks.step import step


@pytest.mark.parametrize(
    ("bench", "arguments", "told"),
    [
        (step, ["nosuch"], "model 'nosuch' is unknown"),
        (step, ["llama-32x1", "nosuch"], "model 'nosuch' is unknown"),  # before anything is timed
        (step, ["llama-33x2"], "multiple of 32 and a depth of at least 1"),
        (step, ["llama-32x0"], "multiple of 32 and a depth of at least 1"),
        (step, ["llama-32x1", "--method", "pedyra:interval=1000"], "no rank could ever move"),
        (step, ["--method", "lorra"], "did you mean 'lora'"),
        (step, ["--smoke", "--rounds", "0"], "rounds is 0; what is measured takes at least 8"),
        (step, ["--threads", "0"], "'--threads'"),
        (step, ["--batch", "0"], "'--batch'"),
        (planted, ["--method", "lora", "--method", "pedira:alpha=1"], "did you mean 'pedyra'"),
        (planted, ["--noise", "0", "--noise", "-1"], "noise is -1.0; it is a finite number of at least 0"),
        (planted, ["--profile", "steep"], "'steep' is unknown; choose from design"),
        (planted, ["--architecture", "tree"], "'tree' is unknown; choose from mlp, block"),
        (cuts, ["nowhere"], "nowhere is no run folder"),
        (cuts, ["nowhere", "--rank", "0"], "'--rank'"),
        (fresh, ["nowhere"], "nowhere is no run folder"),
    ],
)
def test_what_cannot_be_is_told(bench, arguments, told, call):
    code, out, err = call(bench, *arguments)
    assert code == 2 and told in " ".join(err.split()) and "Traceback" not in err and not out


@pytest.mark.parametrize(("bench", "arguments"), [(step, ["--smoke"]), (cuts, ["x"]), (fresh, ["x"])])
def test_a_file_of_other_rows_is_refused_and_left_as_it_is(bench, arguments, call, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"loss": 1.0}\n')
    code, _, err = call(bench, *arguments, "--json", str(tmp_path / "rows.jsonl"))
    assert code == 2 and "holds rows of something else; name another file" in err
    assert (tmp_path / "rows.jsonl").read_text() == '{"loss": 1.0}\n'

"""`pedyra prove --samples` on files as lm-evaluation-harness writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pedyra.lab.cli import main


def write(path: Path, values: Sequence[Any], metric: str = "acc", task: str = "t", **fields: Any) -> Path:
    """A file of samples, one document a value, with the fields that lm_eval 0.4.13 writes (evaluator.py)."""
    rows = [
        {
            "doc_id": number, "doc": {"question": "a\u2028b"}, "target": "x", "arguments": {}, "resps": [],
            "filter": "none", "metrics": [metric], "doc_hash": f"{task}{number}", "prompt_hash": f"p{number}",
            "target_hash": f"x{number}", metric: value, **fields,
        }
        for number, value in enumerate(values)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[int, str, dict[str, Any]]]:
    """call(*arguments): exit code, what was printed, and the row of `pedyra prove --samples`."""

    def prove(*arguments: Any) -> tuple[int, str, dict[str, Any]]:
        file = tmp_path / "proof.jsonl"
        with pytest.raises(SystemExit) as stopped:
            main(["prove", "--samples", *map(str, arguments), "--json", str(file)])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out + err, json.loads(file.read_text()) if file.is_file() else {}

    return prove


def right(lost: int, gained: int, rows: int) -> tuple[list[float], list[float]]:
    """What A and B have right, of which so many are lost and gained from A to B."""
    a = [1.0] * lost + [0.0] * gained + [1.0] * (rows - lost - gained)
    return a, [0.0] * lost + [1.0] * gained + a[lost + gained :]


@pytest.mark.parametrize(
    ("lost", "gained", "margin", "code"),
    [(10, 2, "1.5pt", 0), (10, 2, "0.015 acc", 0), (10, 2, "1.4pt", 3), (10, 2, None, 3), (40, 0, None, 1)],
)
def test_metrics_of_0_and_1_by_tangos_interval(
    call: Callable[..., Any], tmp_path: Path, lost: int, gained: int, margin: str | None, code: int
):
    """Tango's upper bound of 10 lost and 2 gained of 1,000 is 1.49 points; 40 lost are 3.0 at least."""
    files = [write(tmp_path / f"{n}.jsonl", side) for n, side in zip("ab", right(lost, gained, 1000), strict=True)]
    found, text, row = call(*files, *([] if margin is None else ["--margin", margin]))
    assert found == code and "acc" in text
    assert row["difference"] == pytest.approx((lost - gained) / 1000) and row["metric_a"] == (1000 - gained) / 1000


@pytest.mark.parametrize(("margin", "code"), [("0.2 f1", 0), ("0.1 f1", 3), ("0.01 f1", 1)])
def test_other_metrics_by_the_paired_mean(call: Callable[..., Any], tmp_path: Path, margin: str, code: int):
    """Documents fall by 0 or 0.2, half of them each, so the falls have no skewness and Student's bounds are right."""
    a = np.random.default_rng(0).random(200)
    falls = np.array([0.0, 0.2] * 100)
    reach = stats.t.isf(0.05, 199) * stats.sem(falls)
    files = [write(tmp_path / f"{n}.jsonl", [*side], "f1") for n, side in (("a", a), ("b", a - falls))]
    found, _, row = call(*files, "--margin", margin)
    assert found == code and (row["lower"], row["upper"]) == pytest.approx((0.1 - reach, 0.1 + reach))


def test_a_filter_and_a_metric_are_chosen_and_other_prompts_are_told(call: Callable[..., Any], tmp_path: Path):
    """The file holds the documents once for each filter, in another order in B."""
    a, b = right(40, 0, 1000)
    both = {"metrics": ["acc", "exact_match"], "exact_match": 1.0}
    for name, side in (("a", a), ("b", b)):
        flexible = write(tmp_path / "flexible", side, filter="flexible", **both).read_text("utf-8").split("\n")[:-1]
        strict = (
            write(tmp_path / "strict", a, filter="strict", prompt_hash=name, **both).read_text("utf-8").split("\n")[:-1]
        )
        lines = [*flexible, *strict][:: 1 if name == "a" else -1]
        (tmp_path / name).write_text("\n".join(lines) + "\n", "utf-8")
    chosen = [tmp_path / "a", tmp_path / "b", "--metric"]
    assert call(*chosen, "acc", "--filter", "flexible")[0] == 1
    code, text, row = call(*chosen, "acc", "--filter", "strict")
    assert code == 0 and row["other_prompts"] == 1000 and "prompts" in text
    assert call(*chosen, "exact_match", "--filter", "flexible")[0] == 0


FINE = right(1, 1, 200)[0]


@pytest.mark.parametrize(
    ("b", "fields", "arguments", "words"),
    [
        (FINE, {"task": "other"}, [], "document"),
        (FINE, {"target_hash": "other"}, [], "document"),
        (FINE[:150], {}, [], "lacks document 150"),
        (FINE, {"metric": "f1"}, [], "acc"),
        (FINE, {}, ["--metric", "f1"], "acc; give one"),
        (FINE, {}, ["--filter", "strict"], "none; give one"),
        (FINE, {"doc_id": 3}, [], "more than once"),
        ([[1, 2]] * 200, {}, [], "no number"),
        ([float("nan")] * 200, {}, [], "no number"),
        ([0.5] * 200, {}, [], "--margin"),
        ([0.5] * 200, {}, ["--margin", "1pt"], "1pt"),
        (FINE, {}, ["--margin", "1%"], "1%"),
        (FINE, {}, ["--margin", "0.01"], "margin is '0.01'"),
        (FINE, {}, ["--rows", "10"], "--samples"),
        (FINE, {"metrics": None}, [], "metrics"),
        ([], {}, [], "b.jsonl"),
    ],
)  # fmt: skip
def test_what_cannot_be_paired_gets_one_line(
    call: Callable[..., Any], tmp_path: Path, b: list[Any], fields: dict[str, Any], arguments: list[str], words: str
):
    files = [write(tmp_path / "a.jsonl", FINE), write(tmp_path / "b.jsonl", b, **fields)]
    code, text, row = call(*files, *arguments)
    assert code == 2 and words in text and text.count("\n") == 1 and not row


def test_several_metrics_or_filters_need_a_choice_and_a_mean_many_documents(call: Callable[..., Any], tmp_path: Path):
    two = write(tmp_path / "two.jsonl", FINE, metrics=["acc", "acc_norm"], acc_norm=0.0)
    code, text, _ = call(two, two)
    assert code == 2 and "acc, acc_norm" in text
    two.write_text(two.read_text("utf-8") + write(tmp_path / "more", FINE, filter="strict").read_text("utf-8"), "utf-8")
    code, text, _ = call(two, two)
    assert code == 2 and "none, strict" in text
    few = write(tmp_path / "few.jsonl", [0.5] * 99)
    code, text, _ = call(few, few, "--margin", "0.1 acc")
    assert code == 2 and "99 documents" in text
    code, text, _ = call(tmp_path, few)
    assert code == 2 and text.count("\n") == 1


@pytest.mark.parametrize(("name", "of_a", "of_b"), [("strict", 1 / 3, 0.0), ("flexible", 2 / 3, 2 / 3)])
def test_files_that_the_harness_has_written_are_read(call: Callable[..., Any], name: str, of_a: float, of_b: float):
    """EvaluationTracker of lm_eval 0.4.13 wrote them: three sums, asked of two models that say numbers by a rule, with
    two filters. Three documents tell nothing."""
    files = [Path(__file__).parent / "harness" / f"samples_sums_{number}.jsonl" for number in (1, 2)]
    code, text, row = call(*files, "--filter", name)
    assert code == 3 and (row["metric_a"], row["metric_b"]) == (pytest.approx(of_a), pytest.approx(of_b))
    assert row["rows"] == 3 and row["metric"] == "exact_match" and "1 right in A alone" in text

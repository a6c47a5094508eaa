"""The page as a file: whole, self-contained, safe, and small."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pedyra.report import build_report


@pytest.fixture(scope="module")
def page(dynamic_run: Path) -> str:
    return build_report([dynamic_run]).read_text(encoding="utf-8")


def test_the_report_lies_in_the_first_run_unless_told_otherwise(dynamic_run: Path, lora_run: Path, tmp_path: Path):
    assert build_report([dynamic_run, lora_run]) == dynamic_run / "report.html"
    assert build_report([dynamic_run], tmp_path / "new" / "page.html").is_file()
    with pytest.raises(ValueError, match="is a folder"):
        build_report([dynamic_run], tmp_path)


def test_the_page_needs_nothing_from_outside(page: str):
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert not re.findall(r"<(?:link|script|img)[^>]+(?:src|href)=\"(?!data:)", page)


def test_the_header_says_what_was_run_and_what_came_out(page: str):
    header = re.sub(r"<[^>]+>", " ", page.split("<header>")[1].split("</header>")[0])
    for text in (
        "demo",
        "pedyra",
        "minilm",
        "reviews",
        "Accuracy",
        "0.8220",
        "of its budget",
        "2 min 04 s",
        "1.33 GiB",
    ):
        assert text in header


def test_effective_rank_and_utilisation_are_defined(page: str):
    caption = page.split('id="effective-rank"')[1].split("</figcaption>")[0]
    assert "exponential of the entropy" in caption and caption.count("<math") == 2


def test_the_moves_of_every_adjustment_are_listed(page: str):
    table = page.split('<table class="adjustments">')[1].split("</table>")[0]
    assert table.count('<th scope="row">') == 20
    assert "key 0" in table


def test_the_data_is_json_without_not_a_number(page: str):
    data = page.split('id="figures">')[1].split("</script>")[0]
    figures = json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert len(figures["map"][0]["frames"]) == 21


def test_a_deep_model_stays_below_two_megabytes(make_run, tmp_path: Path):
    assert build_report([make_run(tmp_path / "deep", depths=40)]).stat().st_size < 2_000_000


def test_names_from_the_run_are_text_never_markup(dynamic_run: Path, tmp_path: Path):
    folder = Path(shutil.copytree(dynamic_run, tmp_path / "x<b>y"))
    ranks = folder / "ranks.jsonl"
    ranks.write_text(ranks.read_text().replace('"type": "query"', '"type": "</script><img src=x onerror=alert(1)>"'))
    page = build_report([folder]).read_text(encoding="utf-8")
    assert "<img" not in page and "<b>y" not in page


def test_several_runs_are_compared_in_a_table(dynamic_run: Path, lora_run: Path, tmp_path: Path):
    page = build_report([dynamic_run, lora_run], tmp_path / "two.html").read_text(encoding="utf-8")
    rows = re.findall(r"<tr[^>]*>.*?</tr>", page.split('<table class="comparison">')[1].split("</table>")[0], re.S)
    accuracy = next(row for row in rows if "Accuracy" in row)
    assert "0.8220" in accuracy and "0.8100" in accuracy


def test_an_unfinished_run_has_a_page(dynamic_run: Path, tmp_path: Path):
    folder = Path(shutil.copytree(dynamic_run, tmp_path / "running"))
    for name, kept in (("metrics.jsonl", 10), ("ranks.jsonl", 3)):
        lines = (folder / name).read_text().splitlines()[:kept]
        (folder / name).write_text("\n".join(lines) + "\n")
    (folder / "environment.json").unlink()
    page = build_report([folder]).read_text(encoding="utf-8")
    assert "the run is not finished" in page and "not recorded" in page


def test_values_that_are_no_number_become_gaps(dynamic_run: Path, tmp_path: Path):
    folder = Path(shutil.copytree(dynamic_run, tmp_path / "diverged"))
    for name, key in (("metrics.jsonl", "loss"), ("ranks.jsonl", "bert.encoder.layer.0.output.dense")):
        file = folder / name
        file.write_text(re.sub(rf'("{key}": \[?)\d+\.\d+', r"\1NaN", file.read_text()))
    data = build_report([folder]).read_text(encoding="utf-8").split('id="figures">')[1].split("</script>")[0]
    figures = json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert figures["loss"][0]["title"] == "Held-out loss"


def test_the_report_loads_neither_torch_nor_transformers():
    code = "import sys, pedyra.report; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

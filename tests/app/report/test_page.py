"""The page as a file: whole, self-contained, safe, and small."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pedyra.app.report.images import vega_script
from pedyra.app.report.page import build_report, facts, fit_line
from pedyra.app.report.records import read_run


def embedded(page: str) -> dict:
    """What the page draws, as the browser reads it."""
    data = page.split('id="figures">')[1].split("</script>")[0]
    return json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture(scope="module")
def page(dynamic_run: Path) -> str:
    return build_report(dynamic_run).read_text(encoding="utf-8")


def test_the_report_lies_in_the_run_unless_told_otherwise(dynamic_run: Path, tmp_path: Path):
    assert build_report(dynamic_run) == dynamic_run / "report.html"
    assert build_report(dynamic_run, tmp_path / "new" / "page.html").is_file()
    with pytest.raises(ValueError, match="is a folder"):
        build_report(dynamic_run, tmp_path)


def test_the_page_needs_nothing_from_outside(page: str):
    own = page.replace(vega_script(), "")  # which names addresses that it does not ask for
    assert len(own) < len(page) - 800_000
    assert not re.findall(r"https?://", own)
    assert not re.findall(r"<(?:link|script|img)[^>]+(?:src|href)=\"(?!data:)", own)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy and "default-src 'none'" in policy[1] and "eval" not in policy[1]


def test_the_header_says_what_was_run_and_what_came_out(page: str):
    header = re.sub(r"<[^>]+>", " ", page.split("<header>")[1].split("</header>")[0])
    for text in (
        "demo",
        "pedyra",
        "minilm",
        "reviews",
        "Accuracy",
        "0.8220",
        "2 min 4 s",
        "1.4 GB",
    ):
        assert text in header


def test_the_page_holds_the_data_it_draws(page: str, dynamic_run: Path):
    panels = embedded(page)["panels"]
    cells = panels["map-0"]["data"]["values"]
    last = json.loads((dynamic_run / "ranks.jsonl").read_text().splitlines()[-1])
    assert sum(cell["ranks"][-1] for cell in cells) == last["total_rank"]
    assert panels["map-0"]["params"] == [{"name": "adjustment", "value": 20}]
    accuracy = panels["loss-2"]["data"]["values"]
    rows = map(json.loads, (dynamic_run / "metrics.jsonl").read_text().splitlines())
    logged = {row["step"]: row["eval_accuracy"] for row in rows if "eval_accuracy" in row}
    assert [row["x"] for row in accuracy] == list(logged)
    assert [row["y"] for row in accuracy] == pytest.approx(list(logged.values()), rel=1e-4)


def test_a_deep_model_stays_below_two_megabytes(make_run, tmp_path: Path):
    assert build_report(make_run(tmp_path / "deep", depths=40)).stat().st_size < 2_000_000


def test_names_from_the_run_are_text_never_markup(dynamic_run: Path, tmp_path: Path):
    folder = Path(shutil.copytree(dynamic_run, tmp_path / "x<b>y"))
    ranks = folder / "ranks.jsonl"
    ranks.write_text(ranks.read_text().replace('"type": "query"', '"type": "</script><img src=x onerror=alert(1)>"'))
    page = build_report(folder).read_text(encoding="utf-8").replace(vega_script(), "")
    assert "<img" not in page and "<b>y" not in page
    assert page.count("</script>") == 3
    types = {cell["type"] for cell in embedded(page)["panels"]["map-0"]["data"]["values"]}
    assert "</script><img src=x onerror=alert(1)>" in types


def test_an_unfinished_run_has_a_page(dynamic_run: Path, tmp_path: Path):
    folder = Path(shutil.copytree(dynamic_run, tmp_path / "running"))
    for name, kept in (("metrics.jsonl", 10), ("ranks.jsonl", 3)):
        lines = (folder / name).read_text().splitlines()[:kept]
        (folder / name).write_text("\n".join(lines) + "\n")
    (folder / "environment.json").unlink()
    page = build_report(folder).read_text(encoding="utf-8")
    assert "running" in page


def test_values_that_are_no_number_become_gaps(dynamic_run: Path, tmp_path: Path):
    folder = Path(shutil.copytree(dynamic_run, tmp_path / "diverged"))
    for name, key in (("metrics.jsonl", "loss"), ("ranks.jsonl", "bert.encoder.layer.0.output.dense")):
        file = folder / name
        file.write_text(re.sub(rf'("{key}": \[?)\d+\.\d+', r"\1NaN", file.read_text()))
    page = build_report(folder).read_text(encoding="utf-8")
    assert "Training loss" not in page and "Held-out loss" in page
    embedded(page)


def test_of_a_run_that_was_fitted_size_and_proof_come_first(fitted_run: Path):
    page = build_report(fitted_run).read_text(encoding="utf-8")
    header, main = page.split("<header>")[1].split("</header>")
    line = header.split('class="verdict">')[1].split("</p>")[0]
    assert line == "Rank 4 of 8, 0.50 MB of 1.00 MB: the loss rises by at most 0.0370 (95 %), proved."
    assert main.index('id="fit-0"') < main.index('id="loss-0"')


@pytest.mark.parametrize(("share", "accepted", "told"), [(0.5, False, "not proved."), (1.0, None, "No smaller")])
def test_a_fit_whose_size_is_not_proved_says_so(fitted_run: Path, share: float, accepted: bool | None, told: str):
    run = read_run(fitted_run)
    rows = [{**row, "accepted": accepted} if row["chosen"] else row for row in run.curve]
    assert told in fit_line(replace(run, fit={**run.fit, "share": share}, curve=rows))


@pytest.mark.parametrize(
    ("measure", "told"), [("accuracy", "falls by at most 3.70 points"), ("answers", "at most 3.70% of the answers")]
)
def test_a_fit_says_what_it_held(fitted_run: Path, measure: str, told: str):
    run = read_run(fitted_run)
    assert told in fit_line(replace(run, fit={**run.fit, "measure": measure}))


def test_samples_are_shown_where_there_are_some(lora_run: Path, tmp_path: Path):
    folder = Path(shutil.copytree(lora_run, tmp_path / "wrote"))
    rows = [{"prompt": "2 + 2 = ", "text": f"four & <b>{i}</b>"} for i in range(9)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = build_report(folder).read_text(encoding="utf-8")
    assert "four &amp; &lt;b&gt;4" in page and "&lt;b&gt;5" not in page


def test_what_a_run_does_not_know_is_left_out(lora_run: Path):
    known = facts(read_run(lora_run))
    assert list(known) == ["Accuracy", "Trainable parameters", "Training time", "Peak memory"]


def test_a_run_has_one_count_of_the_parameters_of_its_adapter(dynamic_run: Path, fitted_run: Path):
    last = json.loads((dynamic_run / "ranks.jsonl").read_text().splitlines()[-1])["parameters"]
    run = read_run(dynamic_run)
    known = facts(replace(run, final={**run.final, "trainable_parameters": last + 770}))
    assert known["Adapter"] == (f"{last:,}", "parameters, and 770 beside it") and "Trainable parameters" not in known
    assert facts(read_run(fitted_run))["Adapter"][0] == "1,000"  # by the curve of the fit, where no ranks moved


def test_the_adjustments_say_how_many_of_the_added_ranks_stayed(dynamic_run: Path):
    run = read_run(dynamic_run)
    first, name = run.adjustments[0], run.layers[0].name
    gained = {"step": first["step"], "ranks": {**first["ranks"], name: 9}, "added": {name: 2}, "pruned": []}
    # of the layer's nine triples the eighth and ninth are new; the third is not
    lost = {**gained, "added": {}, "pruned": [[name, 2, 0.1], [name, 8, 0.0]]}
    moved = facts(replace(run, adjustments=[gained, lost]))["Adjustments"]
    assert moved == ("2", "2 ranks pruned, 2 added, 1 of which stayed")

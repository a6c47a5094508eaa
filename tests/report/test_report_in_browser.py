"""The page in a real browser: Debian's Chromium driven by Playwright; skipped where one of them is absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pedyra.report import build_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(dynamic_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report([dynamic_run], tmp_path_factory.mktemp("one") / "report.html")


@pytest.fixture(scope="module")
def comparison(dynamic_run: Path, lora_run: Path, make_run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    runs = [dynamic_run, make_run(folder / "deep", depths=32), lora_run]
    return build_report(runs, folder / "report.html")


def open_page(browser, path: Path, width: int, scheme: str = "light"):
    """The page at one width, with the list its errors and requests go to."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.trouble = []
    page.on("console", lambda message: page.trouble.append(message.text))
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.on("request", lambda request: page.trouble.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    page.wait_for_function("[...document.querySelectorAll('.panel')].every(panel => panel.querySelector('svg'))")
    return page


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["report", "comparison"])
def test_no_errors_no_requests_and_no_sideways_scroll(browser, request, which: str, width: int, scheme: str):
    page = open_page(browser, request.getfixturevalue(which), width, scheme)
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    charts = page.locator(".panel svg.chart, .panel svg.map")
    assert charts.count() == page.locator(".panel").count()
    assert "NaN" not in page.content().split('id="figures"')[0]
    assert not [text for text in page.trouble if not text.startswith("data:")]
    page.close()


@pytest.fixture(scope="module")
def still(make_run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run in which no rank moved."""
    folder = tmp_path_factory.mktemp("still")
    run = make_run(folder / "run")
    header, *records = map(json.loads, (run / "ranks.jsonl").read_text().splitlines())
    start = {layer["name"]: layer["rank"] for layer in header["layers"]}
    lines = [header, *({**r, "added": {}, "pruned": [], "ranks": start} for r in records)]
    (run / "ranks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return build_report([run], folder / "report.html")


@pytest.mark.parametrize("width", [390, 1440])
def test_a_run_that_moved_nothing_has_axes_all_the_same(browser, still: Path, width: int):
    page = open_page(browser, still, width)
    chart = page.locator("#moves svg.chart").first
    assert {"0", "1"} <= set(chart.locator("text").all_text_contents())
    assert "NaN" not in page.content().split('id="figures"')[0]
    assert "Infinity" not in chart.inner_html()
    assert "Nothing moved." in page.locator("#moves").inner_text()
    page.close()


def cells(page) -> list[str]:
    return page.locator("#map .cell-text").all_text_contents()


def test_the_slider_moves_the_map_by_keyboard(browser, report: Path):
    page = open_page(browser, report, 1440)
    slider = page.get_by_label("Adjustment", exact=True)
    final = cells(page)
    assert slider.input_value() == "20" and "Adjustment 20 of 20, step 240" in page.locator("#map output").inner_text()
    slider.focus()
    page.keyboard.press("Home")
    assert cells(page) == ["8"] * 36
    assert page.locator("#map output").inner_text().startswith("Start: total rank 288")
    page.keyboard.press("ArrowRight")
    assert "Adjustment 1 of 20, step 50" in page.locator("#map output").inner_text()
    assert page.locator("#map .changed").count() > 0
    page.keyboard.press("End")
    assert cells(page) == final
    page.close()


def test_a_layer_can_be_brought_out(browser, report: Path):
    page = open_page(browser, report, 1440)
    assert page.locator("#trajectories path.highlight").count() == 0
    page.get_by_label("Bring out layer").select_option("query 5")
    assert page.locator("#trajectories path.highlight").count() == 2
    page.close()


def test_the_pointer_reads_values(browser, report: Path):
    page = open_page(browser, report, 1440)
    page.locator("#gradients svg.chart").hover(position={"x": 300, "y": 100})
    tip = page.locator("#gradients .tip").inner_text()
    assert tip.startswith("training step") and all(f"{part}: " in tip for part in "AEB")
    page.close()

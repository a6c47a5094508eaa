"""The page in a real browser, opened from its file: Chromium, headless; skipped where there is none."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from pedyra.app.report.page import build_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --no-first-run "
    "--allow-file-access-from-files --enable-logging=stderr --virtual-time-budget=30000 --dump-dom "
    "--window-size=1500,900"
).split()

# One frame a page and width. What a reader could do is done in each, and what is then seen goes to the result.
OUTER = """<!doctype html><body>%s<pre id="result"></pre><script>
const settled = () => new Promise(done => setTimeout(done, 300));
async function look(frame) {
  const page = frame.contentDocument, one = selector => page.querySelector(selector);
  while (page.body.dataset.drawn !== "yes") await settled();
  for (const details of page.querySelectorAll("details")) details.open = true;
  const all = selector => [...page.querySelectorAll(selector)];
  const texts = () => all("#map-0 text").map(t => t.textContent);
  const seen = {
    scroll: page.documentElement.scrollWidth,
    charts: all(".chart").length,
    drawn: all(".chart svg").length,
    wide: all(".chart").filter(c => c.querySelector("svg").getBoundingClientRect().width > c.clientWidth + 1).length,
    nan: one("main").innerHTML.includes("NaN"),
    dark: one(".chart svg").outerHTML.includes("#9ca6af"),
    resources: frame.contentWindow.performance.getEntriesByType("resource").length,
    end: texts(),
  };
  const set = async (control, value) => {
    control.value = value;
    control.dispatchEvent(new frame.contentWindow.Event("input"));
    await settled();
  };
  await set(one("#map input"), 0);
  [seen.start, seen.told] = [texts(), one("#map output").textContent];
  await set(one("#map input"), 1);
  seen.first = texts();
  return seen;
}
addEventListener("load", async () => {
  const result = {};
  for (const frame of document.querySelectorAll("iframe")) result[frame.id] = await look(frame);
  document.getElementById("result").textContent = JSON.stringify(result);
});
</script>"""


def browse(page: Path, widths: Sequence[int], *, dark: bool = False) -> dict[int, Any]:
    """Width -> what was seen there; under 0 what the browser complained of."""
    frame = '<iframe id="{0}" src="{1}" style="width:{0}px;height:900px;border:0"></iframe>'
    outer = page.with_suffix(".outer.html")
    outer.write_text(OUTER % "".join(frame.format(width, page.as_uri()) for width in widths), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [str(CHROMIUM), *FLAGS, scheme, profile, outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="result">(.+?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    seen = {int(width): value for width, value in json.loads(unescape(found[1])).items()}
    return {**seen, 0: [line for line in done.stderr.splitlines() if "CONSOLE" in line]}


@pytest.fixture(scope="module")
def one(dynamic_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """One run, in the light scheme."""
    return browse(build_report(dynamic_run, tmp_path_factory.mktemp("one") / "page.html"), (390, 1280))


@pytest.fixture(scope="module")
def still(still_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """A run in which nothing moved, in the dark scheme."""
    return browse(build_report(still_run, tmp_path_factory.mktemp("still") / "page.html"), (390,), dark=True)


@pytest.mark.parametrize(("pages", "width"), [("one", 390), ("one", 1280), ("still", 390)])
def test_every_chart_is_drawn_within_the_page_and_nothing_is_fetched(request, pages: str, width: int):
    seen = request.getfixturevalue(pages)[width]
    assert seen["drawn"] == seen["charts"] > 0
    assert seen["scroll"] <= width and seen["wide"] == 0
    assert not seen["nan"]
    assert seen["resources"] == 0


@pytest.mark.parametrize("pages", ["one", "still"])
def test_the_browser_has_nothing_to_complain_of(request, pages: str):
    assert request.getfixturevalue(pages)[0] == []


@pytest.mark.parametrize("width", [390, 1280])
def test_the_slider_moves_the_map(one: dict[int, Any], width: int):
    seen = one[width]
    assert seen["told"].startswith("Start: total rank 288")
    assert seen["start"].count("8") == 36
    assert any("▲" in text for text in seen["first"]) and any("▼" in text for text in seen["first"])
    assert set(seen["end"]) - set(seen["start"]) >= {"22", "16", "11"}


def test_the_charts_follow_the_scheme(one: dict[int, Any], still: dict[int, Any]):
    assert not one[390]["dark"] and still[390]["dark"]

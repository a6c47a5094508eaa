"""vl-convert draws the figures as SVG and PNG files, without a browser, and carries Vega's script for the page."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import altair as alt

from pedyra.app.packaged import cached_folder, import_extra
from pedyra.app.report.chart import Chart, spec_of, theme
from pedyra.app.report.figures import make_figures
from pedyra.app.report.records import read_run
from pedyra.lora.files import refuse_link, write_file

FORMATS = ("svg", "png")
RESOLUTION = 200  # dots per inch of a PNG
_WIDTH, _HEIGHT = 380, 240  # of a panel, in points


def save_figures(run_dir: Path, out_dir: Path) -> None:
    """Write every figure of the report of a run as `out_dir/<figure>.<format>`."""
    refuse_link(out_dir)  # which a run of somebody else may have
    out_dir.mkdir(parents=True, exist_ok=True)
    for figure in make_figures(read_run(run_dir)):
        stills = [still for panel in figure.panels for still in panel.stills or [(panel.title, panel.chart)]]
        for name in FORMATS:
            save_image(side_by_side(stills), out_dir / f"{figure.id}.{name}")


def side_by_side(panels: Iterable[tuple[str, Chart]]) -> alt.ConcatChart:
    """Put titles and charts into one chart, two in a row."""
    charts = []
    for title, chart in panels:
        size = {"width": _WIDTH, "height": _HEIGHT} if chart.width is alt.Undefined else {}
        charts.append(chart.properties(title=title, **size))
    return alt.concat(*charts, columns=2).resolve_scale(color="independent", shape="independent")


def save_image(chart: alt.TopLevelMixin, path: Path) -> None:
    """Draw a chart in the light theme as the format that `path` ends in, svg or png."""
    vl_convert, spec = _vl_convert(), spec_of(chart)
    how: dict[str, Any] = {"config": {**theme("light"), "background": "white"}, "allowed_base_urls": []}
    if path.suffix == ".svg":
        write_file(path, vl_convert.vegalite_to_svg(spec, **how))
    else:
        write_file(path, vl_convert.vegalite_to_png(spec, ppi=RESOLUTION, **how))


def vega_script() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, 0.9 MB. Bundling takes seconds, so the result is kept."""

    def bundle(folder: Path) -> None:
        write_file(folder / "vega.js", _vl_convert().javascript_bundle("window.vegaEmbed = vegaEmbed;"))

    return (cached_folder(f"vega-embed-{version('vl-convert-python')}", bundle) / "vega.js").read_text(encoding="utf-8")


def _vl_convert() -> Any:
    return import_extra("vl_convert", "figures are drawn by vl-convert", "cli")

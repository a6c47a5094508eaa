"""The figures of the page as SVG and PNG files, for papers and slides; drawn by vl-convert, without a browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pedyra.report.chart import Spec, plain, theme
from pedyra.report.figure import Figure
from pedyra.report.figures import make_figures
from pedyra.report.run_folder import read_runs

FORMATS = ("svg", "png")
RESOLUTION = 200  # dots per inch of a PNG
_WIDTH, _HEIGHT = 380, 240  # of a panel, points


def save_figures(run_dirs: Sequence[Path], out_dir: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write every figure of the report as `out_dir/<figure>.<format>`.

    Args:
        run_dirs: run folders, as for `build_report`.
        out_dir: folder to write to, made if absent.
        formats: "svg", "png" or both.

    Returns:
        The paths written.

    Raises:
        ValueError: an unknown format, or a damaged run folder as in `build_report`.
    """
    for name in formats:
        check_format(name)
    figures, _ = make_figures(read_runs(run_dirs))
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    paths = [Path(out_dir) / f"{figure.id}.{name}" for figure in figures for name in formats]
    for path in paths:
        figure = next(figure for figure in figures if figure.id == path.stem)
        save_image(side_by_side(figure), path)
    return paths


def check_format(name: str) -> None:
    if name not in FORMATS:
        raise ValueError(f"format {name!r} is not known: figures are written as svg or png; choose of those")


def side_by_side(figure: Figure) -> Spec:
    """The figure's panels in one specification, two in a row; what a reader would set is at its start."""
    panels, values = [], {}
    for panel in figure.panels:
        values |= {name: value for name, value in panel.values.items() if not panel.stills}
        for title, spec in panel.stills or [(panel.title, panel.spec)]:
            width, height = ({"step": 30}, {"step": 24}) if panel.stills else (_WIDTH, _HEIGHT)
            panels.append({**spec, "width": width, "height": height, "title": title})
    return {
        "concat": panels,
        "columns": 2,
        "params": [{"name": name, "value": value} for name, value in values.items()],
        "resolve": {"scale": {"color": "independent", "shape": "independent"}},
    }


def save_image(spec: Spec, path: Path) -> None:
    """Draw a specification in the light theme as the format that `path` ends in, svg or png."""
    import vl_convert  # type: ignore[import-untyped]

    check_format(path.suffix[1:])
    whole = plain({"$schema": "https://vega.github.io/schema/vega-lite/v6.json", **spec})
    config = {**theme("light"), "background": "white"}
    if path.suffix == ".svg":
        path.write_text(vl_convert.vegalite_to_svg(whole, config=config, allowed_base_urls=[]), encoding="utf-8")
    else:
        path.write_bytes(vl_convert.vegalite_to_png(whole, config=config, ppi=RESOLUTION, allowed_base_urls=[]))

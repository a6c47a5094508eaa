"""Run folders -> one HTML file that needs nothing else: style, script, Vega and data are inside it."""

from __future__ import annotations

import json
from importlib.resources import files
from itertools import groupby
from pathlib import Path

import jinja2
from markupsafe import Markup

from pedyra.app.report import facts
from pedyra.app.report.chart import PALETTE, plain, theme
from pedyra.app.report.figures import Panel, make_figures
from pedyra.app.report.images import vega_script
from pedyra.app.report.records import RunRecords, read_run
from pedyra.app.yaml_file import to_yaml
from pedyra.lora.files import write_file

SAMPLES = 5  # of what the model wrote


def build_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run.

    Args:
        out: the HTML file to write; default `report.html` in the run folder.

    Returns:
        The path written.

    Raises:
        ValueError: the run folder is missing or damaged; the message names the file, the line and the repair.
    """
    run = read_run(run_dir)
    target = run.path / "report.html" if out is None else out
    if target.is_dir():
        raise ValueError(f"out {target} is a folder; name the HTML file to write")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, render(run))
    return target


def render(run: RunRecords) -> str:
    """The page as text."""
    figures = make_figures(run)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    panels = {
        f"{figure.id}-{i}": {**panel.spec, "params": _slider(panel)}
        for figure in figures
        for i, panel in enumerate(figure.panels)
    }
    return environment.get_template("page.html").render(
        run=run,
        sections=[(name, list(group)) for name, group in groupby(figures, key=lambda figure: figure.section)],
        numbers={figure.id: number for number, figure in enumerate(figures, start=1)},
        described=facts.description(run),
        cards=facts.facts(run),
        samples=SAMPLES,
        # Ours or Vega's and free of user text, so they go in unescaped.
        style=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        vega=Markup(vega_script()),
        data=_data({"panels": panels, "themes": {scheme: theme(scheme) for scheme in PALETTE}}),
        to_yaml=to_yaml,
    )


def _slider(panel: Panel) -> list[dict]:
    """The parameter that a panel's slider sets, at its last place."""
    return [{"name": "adjustment", "value": len(panel.frames) - 1}] if panel.frames else []


def _data(value: dict) -> Markup:
    """JSON inside a script element: "<" is escaped, so that no layer name can end the element."""
    text = json.dumps(plain(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _asset(name: str) -> str:
    return (files("pedyra.app.report") / name).read_text(encoding="utf-8")

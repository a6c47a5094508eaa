"""Run folders -> one HTML file that needs nothing else: style, script and data are inside it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from itertools import groupby
from pathlib import Path

import jinja2
import yaml
from markupsafe import Markup

from pedyra.report import tables
from pedyra.report.chart import PALETTE, Figure, plain
from pedyra.report.figures import make_figures
from pedyra.report.run_folder import Run, read_runs


def build_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of one run, or of several side by side.

    Args:
        run_dirs: run folders; several are overlaid where they share axes, and compared in a table.
        out: the HTML file to write; default `report.html` in the first run folder.

    Returns:
        The path written.

    Raises:
        ValueError: a run folder is missing or damaged; the message names the file, the line and the repair.
    """
    runs = read_runs(run_dirs)
    target = Path(out) if out is not None else runs[0].path / "report.html"
    if target.is_dir():
        raise ValueError(f"out {target} is a folder; name the HTML file to write")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so that a full disk leaves the last report whole.
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_text(render(runs), encoding="utf-8")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    figures = make_figures(runs)
    numbers = {figure.id: number for number, figure in enumerate(figures, start=1)}
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        runs=runs,
        sections=[(name, list(group)) for name, group in groupby(figures, key=lambda figure: figure.section)],
        numbers=numbers,
        tables=tables,
        rows=_comparison(runs),
        palette=PALETTE,
        # Ours and free of user text, so they go in unescaped.
        style=Markup(_asset("page.css")),
        scripts=[Markup(_asset(name)) for name in ("charts.js", "pointer.js", "rank_map.js", "page.js")],
        data=_data(figures),
        to_yaml=lambda value: yaml.safe_dump(value, sort_keys=False, allow_unicode=True),
    )


def _comparison(runs: Sequence[Run]) -> list[tuple[str, list[tables.Fact]]]:
    """Rows `(name, one fact per run)`; what no run recorded is left out."""
    columns = [[*tables.facts(run), *tables.diagnostics(run)] for run in runs]
    rows = [(row[0].name, list(row)) for row in zip(*columns, strict=True)]
    metrics = dict.fromkeys(column[0].name for column in columns)
    rows[0] = (" / ".join(metrics), rows[0][1])
    return [(name, row) for name, row in rows if any(fact.value != tables.ABSENT for fact in row)]


def _data(figures: Sequence[Figure]) -> Markup:
    """The figures as JSON inside a script element: "<" is escaped, so that no layer name can end the element."""
    panels = {figure.id: [plain(asdict(panel)) for panel in figure.panels] for figure in figures}
    text = json.dumps(panels, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _asset(name: str) -> str:
    return (files("pedyra.report") / name).read_text(encoding="utf-8")

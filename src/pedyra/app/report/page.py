"""A run folder becomes one HTML file that needs nothing else: style, script, Vega and data are inside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich.filesize import decimal

from pedyra.allocate.allocation import stayed
from pedyra.app.console import format_seconds
from pedyra.app.report.chart import PALETTE, spec_of, theme
from pedyra.app.report.figures import make_figures
from pedyra.app.report.images import vega_script
from pedyra.app.report.records import RunRecords, read_run
from pedyra.app.yaml_file import to_yaml
from pedyra.errors import UserError
from pedyra.lora.card import shown_megabytes
from pedyra.lora.files import write_file

SAMPLES = 5  # so many of the model's texts are shown
ABSENT = "–"  # it stands for what a run did not record


def build_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run to `out`, by default `report.html` in the run folder; the path written."""
    run = read_run(run_dir)
    target = run.path / "report.html" if out is None else out
    if target.is_dir():
        raise UserError(f"out {target} is a folder; name the HTML file to write")
    write_file(target, render(run))
    return target


def render(run: RunRecords) -> str:
    figures = make_figures(run)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    panels = {
        # The slider of a panel sets this parameter, and begins at its last place.
        f"{figure.id}-{i}": spec_of(panel.chart)
        | {"params": [{"name": "adjustment", "value": len(panel.frames) - 1}] if panel.frames else []}
        for figure in figures
        for i, panel in enumerate(figure.panels)
    }
    return environment.get_template("page.html").render(
        run=run,
        sections=[(name, list(group)) for name, group in groupby(figures, key=lambda figure: figure.section)],
        numbers={figure.id: number for number, figure in enumerate(figures, start=1)},
        described=description(run),
        fitted=fit_line(run) if run.fit else "",
        cards=facts(run),
        samples=SAMPLES,
        # These are ours or Vega's and free of user text, so they go in unescaped.
        style=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        vega=Markup(vega_script()),
        data=_data({"panels": panels, "themes": {scheme: theme(scheme) for scheme in PALETTE}}),
        to_yaml=to_yaml,
    )


def _data(value: dict) -> Markup:
    """Write JSON for a script element: "<" is escaped, so that no layer name can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _asset(name: str) -> str:
    return (files("pedyra.app.report") / name).read_text(encoding="utf-8")


def description(run: RunRecords) -> dict[str, str]:
    """Tell what was run: method, model, data, seed, steps, LoRA settings."""
    recipe, method = run.recipe, run.recipe["method"]
    steps = run.header["schedule"]["total_steps"] or run.final["step"]
    rows = {
        "Method": method if isinstance(method, str) else method["name"],
        "Model": _words(recipe["model"], "name", "quantization"),
        "Data": _words(recipe["data"], "source", "kind"),
        "LoRA": f"rank {recipe['lora']['r']}, alpha {recipe['lora']['alpha']}",
        "Steps": f"{steps:,}" if steps else None,
        "Seed": recipe["seed"],
    }
    return {name: str(value) for name, value in rows.items() if value not in (None, "")}


def fit_line(run: RunRecords) -> str:
    """Tell in a line the size that a fit took, and what is known of it; the rest is beside Figure 1."""
    fit, size = run.fit, next((row for row in run.curve if row["chosen"]), None)
    if fit["share"] >= 1:
        return f"No smaller rank is proved: rank {fit['rank']} is kept whole."
    size_text = f"Rank {fit['rank']} of {fit['of_rank']}, {shown_megabytes(fit['megabytes'])} of "
    size_text += shown_megabytes(fit["of_megabytes"])
    if size is None or size["upper"] is None:
        return f"{size_text}."
    high = size["upper"]
    change = {
        "answers": f"at most {high:.2%} of the answers change",
        "accuracy": f"the accuracy falls by at most {100 * high:.2f} points",
    }.get(fit["measure"], f"the {fit['measure']} rises by at most {high:.4f}")
    verdict = "proved" if size["accepted"] else "beyond what was asked" if size["beyond"] else "not proved"
    return f"{size_text}: {change} (95 %), {verdict}."


def facts(run: RunRecords) -> dict[str, tuple[str, str]]:
    """Collect what is known of a run: name -> its value as text, and a second line that puts it in proportion."""
    final, facts = run.final, {}
    if final["value"] is not None:
        name, loss = str(final["metric"] or "result").replace("_", " "), final["eval_loss"]
        detail = "" if loss is None else f"held-out loss {_number(loss)}"
        facts[name[:1].upper() + name[1:]] = (_number(final["value"]), detail)
    elif not final["final"]:
        facts["Result"] = (ABSENT, "the run is not finished")
    trainable, factors = final["trainable_parameters"], run.parameters
    if factors is not None:
        beside = 0 if trainable is None else trainable - factors
        facts["Adapter"] = (f"{factors:,}", f"parameters, and {beside:,} beside it" if beside > 0 else "parameters")
    elif trainable is not None:
        facts["Trainable parameters"] = (f"{trainable:,}", "")
    if run.layers:
        start, ends = sum(run.start_ranks.values()), run.final_ranks.values()
        each = " to ".join(map(str, sorted({min(ends), max(ends)})))
        value = f"{start:,}" if start == sum(ends) else f"{start:,} → {sum(ends):,}"
        facts["Total rank"] = (value, f"{len(run.layers)} layers of rank {each}")
    if run.adjustments:
        pruned = sum(len(record["pruned"]) for record in run.adjustments)
        added = sum(sum(record["added"].values()) for record in run.adjustments)
        rest = f", {stayed(run.adjustments)} of which stayed" if added else ""
        facts["Adjustments"] = (str(len(run.adjustments)), f"{pruned} ranks pruned, {added} added{rest}")
    if ratios := [ratio for row in run.snapshots if (ratio := row.get("orthogonality_ratio")) is not None]:
        facts["Gradient of Eq. (2)"] = (f"{ratios[-1]:.1f} times", "that of the task, the median step")
    if final["seconds"] is not None:
        speed = final["step"] / final["seconds"] if final["seconds"] else 0.0
        facts["Training time"] = (format_seconds(final["seconds"]), f"{speed:.2f} steps per second")
    if final["peak_memory_bytes"] is not None:
        device = str(run.environment.get("device", ""))
        facts["Peak memory"] = (decimal(final["peak_memory_bytes"]), device)
    return facts


def _words(section: Mapping[str, Any], *keys: str) -> str:
    return ", ".join(str(section[key]) for key in keys if section.get(key) not in (None, "none"))


def _number(value: float) -> str:
    """Write four decimals, or four significant digits from 10 on: results of a table line up."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"

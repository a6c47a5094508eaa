"""Tables of a comparison, and how they are written: Markdown, LaTeX, HTML. What a cell claims is decided before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

TIE = "="
"""Mark of a value that the intervals cannot tell from the best."""


@dataclass(frozen=True)
class Cell:
    """One value."""

    text: str
    bold: bool = False
    """The best of its column, by an interval."""
    tie: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column is text and whose other columns are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


def markdown(title: str, tables: Sequence[Table], remarks: Sequence[str]) -> str:
    """A document with every table, and the remarks (failures, warnings) as a list."""
    parts = [f"# {title}"]
    for table in tables:
        header = f"| {' | '.join(_md(column) for column in table.columns)} |"
        rule = "|" + "|".join([":--"] + ["--:"] * (len(table.columns) - 1)) + "|"
        rows = [f"| {' | '.join(_md_cell(cell) for cell in row)} |" for row in table.rows]
        parts += [f"## {table.title}", "\n".join([header, rule, *rows]), *([table.note] if table.note else [])]
    if remarks:
        parts += ["## Remarks", "\n".join(f"- {remark}" for remark in remarks)]
    return "\n\n".join(parts) + "\n"


def _md(text: str) -> str:
    return text.replace("|", "\\|")


def _md_cell(cell: Cell) -> str:
    text = f"**{_md(cell.text)}**" if cell.bold else _md(cell.text)
    return f"{text} {TIE}" if cell.tie else text


def latex(title: str, tables: Sequence[Table], remarks: Sequence[str]) -> str:
    """Every table as a `table` environment with booktabs; the remarks are comments."""
    parts = [f"% {title}: needs \\usepackage{{booktabs}}", *(f"% {remark}" for remark in remarks)]
    for table in tables:
        lines = [
            "\\begin{table}",
            f"\\caption{{{_tex(table.title)}. {_tex(table.note)}}}",
            f"\\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
            "\\toprule",
            " & ".join(_tex(column) for column in table.columns) + " \\\\",
            "\\midrule",
            *(" & ".join(_tex_cell(cell) for cell in row) + " \\\\" for row in table.rows),
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


_TEX = {
    **{"\\": "\\textbackslash{}", "±": "$\\pm$", "×": "$\\times$", "−": "$-$", "~": "\\textasciitilde{}"},
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "^": "\\textasciicircum{}",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def _tex_cell(cell: Cell) -> str:
    text = f"\\textbf{{{_tex(cell.text)}}}" if cell.bold else _tex(cell.text)
    return f"{text}$^{{{TIE}}}$" if cell.tie else text


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .3rem .8rem; text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1px solid; }
tbody tr:nth-child(even) { background: color-mix(in srgb, currentColor 5%, transparent); }
.note { max-width: 50rem; }
"""


def html(title: str, tables: Sequence[Table], remarks: Sequence[str]) -> str:
    """One page that needs nothing from elsewhere."""
    parts = [
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>",
    ]
    for table in tables:
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
        rows = "\n".join(f"<tr>{''.join(_html_cell(cell) for cell in row)}</tr>" for row in table.rows)
        parts.append(
            f'<h2>{escape(table.title)}</h2>\n<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{rows}\n</tbody>\n</table></div>"
        )
        if table.note:
            parts.append(f'<p class="note">{escape(table.note)}</p>')
    if remarks:
        items = "\n".join(f"<li>{escape(remark)}</li>" for remark in remarks)
        parts.append(f"<h2>Remarks</h2>\n<ul>\n{items}\n</ul>")
    return "\n".join([*parts, "</body>\n</html>"]) + "\n"


def _html_cell(cell: Cell) -> str:
    text = f"<strong>{escape(cell.text)}</strong>" if cell.bold else escape(cell.text)
    return f"<td>{text}<sup>{TIE}</sup></td>" if cell.tie else f"<td>{text}</td>"

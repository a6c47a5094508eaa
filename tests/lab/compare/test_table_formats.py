"""Every format shows the same cells, and text cannot break out of any."""

from __future__ import annotations

from pedyra.lab.compare.table_formats import Cell, Table, html, latex, markdown

TABLE = Table(
    "T_1 & more", ["method", "a|b"], [[Cell("x<y"), Cell("1 ± 2", bold=True)], [Cell("z"), Cell("3×", tie=True)]]
)


def test_markdown():
    assert markdown("Title", [TABLE], ["careful"]) == (
        "# Title\n\n## T_1 & more\n\n| method | a\\|b |\n|:--|--:|\n| x<y | **1 ± 2** |\n| z | 3× = |\n\n"
        "## Remarks\n\n- careful\n"
    )


def test_latex():
    text = latex("Title", [TABLE], [])
    assert "\\caption{T\\_1 \\& more. }" in text
    assert "x<y & \\textbf{1 $\\pm$ 2} \\\\" in text and "z & 3$\\times$$^{=}$ \\\\" in text
    assert text.count("\\begin{tabular}{lr}") == 1


def test_html_needs_nothing_from_elsewhere_and_escapes():
    page = html("<Title>", [TABLE], ["a < b"])
    assert "<title>&lt;Title&gt;</title>" in page and "<td>x&lt;y</td>" in page
    assert "<td><strong>1 ± 2</strong></td>" in page and "<td>3×<sup>=</sup></td>" in page
    assert "<li>a &lt; b</li>" in page
    assert "http" not in page and "<script" not in page

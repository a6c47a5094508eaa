"""A table is written with the same cells everywhere, and text cannot break out of any format."""

from __future__ import annotations

from pedyra.lab.compare.tables import Table, write_tables


def test_markdown_and_latex_have_the_same_cells(tmp_path):
    table = Table("T_1", [{"method": "x_y", "a|b": "1 ± 2 *"}, {"method": "z", "a|b": "3×"}], "A note.")
    markdown, latex = write_tables(tmp_path / "t", "Title", [table], ["careful"])
    assert markdown.read_text() == (
        "# Title\n\n## T_1\n\n| method | a\\|b |\n| :-- | --: |\n| x_y | 1 ± 2 * |\n| z | 3× |\n\nA note.\n\n"
        "## Remarks\n\n- careful\n"
    )
    assert "x\\_y & 1 ± 2 * \\\\" in latex.read_text() and "\\begin{tabular}{lr}" in latex.read_text()

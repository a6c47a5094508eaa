"""Text in a table cannot break out of its cell."""

from __future__ import annotations

from pedyra.lab.compare.tables import TextTable, write_tables


def test_markdown_has_a_heading_a_table_a_note_and_the_remarks(tmp_path):
    table = TextTable("T_1", [{"method": "x_y", "a|b": "1 ± 2"}, {"method": "z", "a|b": "3×"}], "A note.")
    assert write_tables(tmp_path / "t", "Title", [table], ["careful"]).read_text() == (
        "# Title\n\n## T_1\n\n| method | a\\|b |\n| :-- | --: |\n| x_y | 1 ± 2 |\n| z | 3× |\n\nA note.\n\n"
        "## Remarks\n\n- careful\n"
    )

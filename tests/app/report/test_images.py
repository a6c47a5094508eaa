"""Figures as files, drawn without a browser."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from pedyra.app.report.images import save_figures


def test_every_figure_is_a_file_of_both_formats(dynamic_run: Path, tmp_path: Path):
    save_figures(dynamic_run, tmp_path / "figures")
    vectors, images = ([*(tmp_path / "figures").glob(f"*.{name}")] for name in ("svg", "png"))
    assert len(vectors) == len(images) == 4
    assert all(ElementTree.parse(path).getroot().tag.endswith("svg") for path in vectors)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in images)
    texts = [node.text for node in ElementTree.parse(tmp_path / "figures/map.svg").iter() if node.text]
    assert texts.count("8") > 36  # all cells of the start, and some of the end

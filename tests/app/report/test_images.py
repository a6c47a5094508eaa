"""Figures as files, drawn without a browser."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from pedyra.app.report.images import save_figures


def test_every_figure_is_a_file(dynamic_run: Path, tmp_path: Path):
    paths = save_figures(dynamic_run, tmp_path / "figures", formats=["svg"])
    assert len(paths) == 4 and all(ElementTree.parse(path).getroot().tag.endswith("svg") for path in paths)
    texts = [node.text for node in ElementTree.parse(tmp_path / "figures/map.svg").iter() if node.text]
    assert texts.count("8") > 36  # all cells of the start, and some of the end


def test_both_formats_are_written_unless_told_otherwise(lora_run: Path, tmp_path: Path):
    assert save_figures(lora_run, tmp_path) == [tmp_path / "loss.svg", tmp_path / "loss.png"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_importing_the_report_loads_nothing_that_draws():
    code = "import sys, pedyra.app.report.images, pedyra.app.report.page\n"
    code += "print([m for m in ('vl_convert', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

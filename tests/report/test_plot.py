"""Figures as files, and that drawing them leaves matplotlib as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

from pedyra.report import save_figures


def test_every_figure_is_written_in_every_format(dynamic_run: Path, tmp_path: Path):
    paths = save_figures([dynamic_run], tmp_path / "figures")
    assert len(paths) == 22 and all(path.is_file() for path in paths)
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
        else:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_one_format_of_a_plain_run(lora_run: Path, tmp_path: Path):
    assert save_figures([lora_run], tmp_path, formats=["svg"]) == [tmp_path / "loss.svg"]


def test_several_runs_are_drawn(dynamic_run: Path, lora_run: Path, tmp_path: Path):
    assert (tmp_path / "map.svg") in save_figures([dynamic_run, lora_run], tmp_path, formats=["svg"])


def test_an_unknown_format_is_refused(dynamic_run: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="format 'gif' is not known"):
        save_figures([dynamic_run], tmp_path, formats=["gif"])


def test_global_settings_stay(lora_run: Path, tmp_path: Path):
    before = dict(matplotlib.rcParams)
    save_figures([lora_run], tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_not_loaded():
    code = "import sys, pedyra.report; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

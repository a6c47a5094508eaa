"""Files of packages are found without importing them; what is prepared from them is kept, whole or not at all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pedyra.app.packaged import cache_dir, packaged_file, prepared


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEDYRA_CACHE", str(tmp_path / "cache"))


def test_a_file_is_found_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "carrier"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "text.csv").write_text("a")
    monkeypatch.syspath_prepend(tmp_path)
    assert packaged_file("carrier/text.csv", install="") == package / "text.csv"


def test_an_absent_package_is_told_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ImportError, match="run: pip install carrier"):
        packaged_file("carrier/text.csv", install="pip install carrier")


def test_a_folder_is_prepared_once():
    calls = []

    def prepare(folder: Path) -> None:
        calls.append(folder)
        (folder / "a").write_text("ready")

    first, second = prepared("thing", prepare), prepared("thing", prepare)
    assert first == second == cache_dir() / "thing"
    assert (first / "a").read_text() == "ready"
    assert len(calls) == 1


def test_a_failed_preparation_leaves_nothing():
    def prepare(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        prepared("thing", prepare)
    assert list(cache_dir().iterdir()) == []


def test_of_two_preparations_at_once_the_first_stays():
    def prepare(folder: Path) -> None:
        (folder / "a").write_text("late")
        (cache_dir() / "thing").mkdir()
        (cache_dir() / "thing" / "a").write_text("early")

    assert (prepared("thing", prepare) / "a").read_text() == "early"


def test_the_cache_lies_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PEDYRA_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "pedyra"

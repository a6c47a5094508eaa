"""Files of packages are found without importing them; what is prepared from them is kept, whole or not at all."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from time import sleep

import pytest

from pedyra.app.packaged import cached_folder, packaged_file


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


def test_a_failed_preparation_leaves_nothing(tmp_path: Path):
    def prepare(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        cached_folder("thing", prepare)
    assert not (tmp_path / "cache" / "thing").exists()


def test_of_two_preparations_at_once_the_second_waits_and_takes_the_first():
    begun, calls = Event(), []

    def prepare(folder: Path) -> None:
        calls.append(folder)
        begun.set()
        sleep(0.2)
        (folder / "a").write_text("ready")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cached_folder, "thing", prepare)
        begun.wait()
        second = pool.submit(cached_folder, "thing", prepare)
    assert (first.result() / "a").read_text() == "ready" and second.result() == first.result() and len(calls) == 1


def test_a_cache_that_cannot_be_made_is_told_with_the_repair(tmp_path: Path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    with pytest.raises(ValueError, match="set PEDYRA_CACHE to a folder that can"):
        cached_folder("thing", lambda folder: None)

"""The wheel and the sdist: what a user installs has what the program reads, and nothing else."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import pedyra

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both, built of a copy, so that the checkout stays as it is."""
    setuptools = pytest.importorskip("setuptools", minversion="77")
    assert setuptools is not None
    source = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in ("src", "tests", "docs", "research", "recipes", "benchmarks"):  # which a build could take by mistake
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, ignore=ignored, symlinks=True)
    code = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(built.glob("*.whl")))


def test_the_wheel_has_every_file_of_the_package(wheel: zipfile.ZipFile):
    package = Path(pedyra.__file__).parent
    wanted = {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == wanted
    suffixes = {Path(name).suffix for name in found}
    assert {".py", ".yaml", ".html", ".js", ".css"} <= suffixes and "pedyra/py.typed" in found


def test_no_tests_and_no_data_are_in_the_wheel_or_the_sdist(built: Path, wheel: zipfile.ZipFile):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = [name.partition("/")[2] for name in sdist.getnames()]
    assert "src/pedyra/app/report/page.html" in names and "LICENSE" in names and "setup.py" in names
    outside = ("tests", "docs", "research", "recipes", "benchmarks", "build")
    for name in [*names, *wheel.namelist()]:
        assert not name.startswith(outside) and not name.endswith(".jsonl"), name
    assert sum(each.file_size for each in wheel.infolist()) < 3_000_000


def test_the_metadata_is_that_of_the_project(wheel: zipfile.ZipFile):
    name = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = message_from_bytes(wheel.read(name))
    assert metadata["Version"] == pedyra.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    urls = dict(each.split(", ") for each in metadata.get_all("Project-URL") or [])
    repository = runpy.run_path(str(ROOT / "setup.py"))["REPOSITORY"]
    assert urls["Repository"] == repository and {"Documentation", "Issues"} <= urls.keys()
    assert metadata["Description-Content-Type"] == "text/markdown"
    readme = metadata.get_payload()
    assert isinstance(readme, str) and readme.lstrip().startswith("# pedyra")
    # On an index there is no file beside the README.
    links = re.findall(r"\]\(([^)\s]+)", readme)
    assert links and all(link.startswith(("https://", "#")) for link in links)
    for path in (link.removeprefix(f"{repository}/blob/main/") for link in links if "/blob/main/" in link):
        assert (ROOT / path.partition("#")[0]).exists(), path


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[a](docs/a.md#b)", "[a](https://github.com/pedyra/pedyra/blob/main/docs/a.md#b)"),
        ("![a](docs/a.png)", "![a](https://github.com/pedyra/pedyra/raw/main/docs/a.png)"),
        ('<img src="docs/a.png">', '<img src="https://github.com/pedyra/pedyra/raw/main/docs/a.png">'),
        ("[a](https://x.org/y) [b](#c)", "[a](https://x.org/y) [b](#c)"),
    ],
)
def test_links_of_the_readme_lead_somewhere_from_an_index(text: str, wanted: str):
    assert runpy.run_path(str(ROOT / "setup.py"))["for_an_index"](text) == wanted

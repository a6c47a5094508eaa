"""The pages of the docs: their tables are those of their rows, and whatever they point at is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "pedyra"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "research").glob("*.md"))
MADE = ("recipe.md", "index.md")
"""Pages that docs/hooks.py makes when the site is built."""


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_tables_are_what_the_command_writes(page: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    pytest.importorskip("scipy", reason="needs pedyra[cli]")
    tables = __import__("tables")
    assert page.read_text() == tables.written(page), "run: python docs/tables.py"


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_link_leads_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(page.read_text())):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists() or linked.name in MADE, f"{page.name} links to {target}"
        if anchor:
            assert anchor in _anchors(linked), f"{page.name} links to {target}; {linked.name} has {_anchors(linked)}"


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_file_and_function_that_is_named_exists(page: Path):
    """In code: `room/file.py`, `room/file.py: Class.method`, and paths of this repository."""
    text = page.read_text()
    for path, name in re.findall(r"`([\w/]+\.py)(?:: ([\w.]+))?`", text):
        home = PACKAGE / path
        if not home.exists():
            home = ROOT / path
        assert home.exists(), f"{page.name} names {path}"
        assert not name or name in _defined(home), f"{page.name} names {name} in {path}"
    for path in re.findall(r"\b((?:recipes|examples|tests|docs/images)/[\w./]+\.\w+)", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


@pytest.mark.parametrize("name", ["walk_gradient", "walk_fit"])
def test_every_stop_of_a_walk_names_its_function(name: str):
    stops = re.findall(
        r"^\| \d+ \| (.+?) \|", (ROOT / "docs" / "contributing" / f"{name}.md").read_text(), re.MULTILINE
    )
    assert stops and all(re.match(r"`[\w/]+\.py: [\w.]+`", stop) for stop in stops), stops


def _without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """Of the headings, as mkdocs and GitHub make them of these letters."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@cache
def _defined(path: Path) -> set[str]:
    """Names of a module: its functions and classes, and Class.method."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return found


def test_the_page_of_all_keys_has_a_word_about_each(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    pytest.importorskip("pydantic", reason="needs pedyra[cli]")
    from pedyra.app.recipe import recipe_schema

    schema = recipe_schema()
    page = __import__("recipe_page").recipe_page(schema)
    rows = [line for line in page.splitlines() if line.startswith("| `") and not line.startswith("| `training.")]
    sections = ("ModelSection", "DataSection", "LoraSection")
    keys = {key for section in sections for key in schema["$defs"][section]["properties"]}
    assert {row.split("`")[1].rpartition(".")[2] for row in rows} >= keys
    assert [row for row in rows if row.endswith("|  |")] == []

"""The schemas of recipes and grids, which editors read: as the models make them; every file of ours fits its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import pedyra
from pedyra.app.recipe import recipe_schema
from pedyra.app.yaml_file import parse_yaml
from pedyra.lab.compare.grid import grid_schema

PACKAGE = Path(pedyra.__file__).parent
ROOT = Path(__file__).parents[2]
SCHEMAS = {PACKAGE / "app/recipe.schema.json": recipe_schema, PACKAGE / "lab/compare/grid.schema.json": grid_schema}
FILES = [*sorted((ROOT / "recipes").glob("*.yaml")), *sorted((PACKAGE / "lab/paper/recipes").glob("*.yaml"))]


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_the_committed_schema_is_the_generated_one(path: Path):
    kind = path.name.removesuffix(".schema.json")
    assert json.loads(path.read_text()) == SCHEMAS[path](), f"run: pedyra schema {kind} > {path}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_editor_finds_the_schema_and_no_fault(path: Path):
    first, separator, place = path.read_text().splitlines()[0].partition("$schema=")
    assert separator and first == "# yaml-language-server: "
    schema = (path.parent / place).resolve()
    if path.is_relative_to(PACKAGE):  # in the wheel, too
        assert schema.is_relative_to(PACKAGE)
    assert schema in SCHEMAS
    if find_spec("jsonschema") is None:
        pytest.skip("needs jsonschema")
    import jsonschema

    validator: Any = jsonschema.Draft202012Validator(json.loads(schema.read_text()))
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(content(path))] == []


def content(path: Path) -> Any:
    return parse_yaml(path.read_bytes(), path.name)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("smoke", {"lora": {"rank": 3}}),
        ("smoke", {"fit": {"tolerance": 2}}),
        ("smoke", {"fit": {"tolerance": "much"}}),
        ("smoke", {"rank": {"budget": "money"}}),
        ("compare_smoke", {"methods": {"lora": {"rate": 1}}}),
        ("compare_smoke", {"seeds": "0"}),
    ],
)
def test_an_editor_shows_a_fault(name: str, change: Any):
    jsonschema = pytest.importorskip("jsonschema")
    schema = grid_schema() if name.startswith("compare_") else recipe_schema()
    whole = content(ROOT / "recipes" / f"{name}.yaml")
    assert jsonschema.Draft202012Validator(schema).is_valid(whole)
    assert not jsonschema.Draft202012Validator(schema).is_valid({**whole, **change})


def test_a_shell_completes_verbs():
    """As typer's own script for bash asks for it."""
    asked = {"_PEDYRA_COMPLETE": "complete_bash", "COMP_WORDS": "pedyra tra", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "from pedyra.__main__ import main; main()"],
        env={**os.environ, **asked}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == ["train"], done.stderr

"""The schemas of recipes and grids, which editors read; every file of ours fits its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pedyra
from pedyra.app.recipe import recipe_schema
from pedyra.app.yaml_file import parse_yaml
from pedyra.lab.cli import main
from pedyra.lab.compare.grid import grid_schema

PACKAGE = Path(pedyra.__file__).parent
ROOT = Path(__file__).parents[2]
FILES = [*sorted((ROOT / "recipes").glob("*.yaml")), *sorted((PACKAGE / "lab/paper/recipes").glob("*.yaml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_editor_finds_no_fault(path: Path):
    jsonschema = pytest.importorskip("jsonschema")
    validator: Any = jsonschema.Draft202012Validator(grid_schema() if "methods" in content(path) else recipe_schema())
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(content(path))] == []


@pytest.mark.parametrize(("kind", "schema"), [("recipe", recipe_schema), ("grid", grid_schema)])
def test_the_command_prints_a_schema(kind: str, schema: Callable[[], Any], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["schema", kind])
    assert json.loads(capsys.readouterr().out) == schema()


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
        ("compare_smoke", {"tasks": ["toy", {"mine": {"source": "mine.csv"}}]}),
        ("compare_smoke", {"methods": ["lora", {"pedyra": {}}]}),
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

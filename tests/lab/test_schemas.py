"""The schema of recipes, which editors read; every recipe of ours fits it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pedyra
from pedyra.app.recipe import recipe_schema
from pedyra.app.yaml_file import parse_yaml
from pedyra.lab.cli import main

PACKAGE = Path(pedyra.__file__).parent
ROOT = Path(__file__).parents[2]
RECIPES = [
    *(path for path in sorted((ROOT / "recipes").glob("*.yaml")) if not path.name.startswith("compare_")),
    *sorted((PACKAGE / "lab/paper/recipes").glob("*.yaml")),
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_an_editor_finds_no_fault(path: Path):
    jsonschema = pytest.importorskip("jsonschema")
    validator: Any = jsonschema.Draft202012Validator(recipe_schema())
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(content(path))] == []


def test_the_command_prints_the_schema(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["schema"])
    assert json.loads(capsys.readouterr().out) == recipe_schema()


def content(path: Path) -> Any:
    return parse_yaml(path.read_bytes(), path.name)


@pytest.mark.parametrize(
    "change",
    [
        {"lora": {"rank": 3}},
        {"fit": {"tolerance": 2}},
        {"fit": {"tolerance": "much"}},
        {"method": {"name": "pedyra", "budget": "money"}},
    ],
)
def test_an_editor_shows_a_fault(change: Any):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(recipe_schema())
    whole = content(ROOT / "recipes" / "smoke.yaml")
    assert validator.is_valid(whole) and not validator.is_valid({**whole, **change})


def test_a_shell_completes_verbs():
    """As typer's own script for bash asks for it."""
    asked = {"_PEDYRA_COMPLETE": "complete_bash", "COMP_WORDS": "pedyra tra", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "from pedyra.__main__ import main; main()"],
        env={**os.environ, **asked}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == ["train"], done.stderr

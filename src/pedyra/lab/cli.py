"""The whole command line: the verbs of `app`, and beside them those that put methods side by side."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from pedyra.app.cli import app, main
from pedyra.lab.compare.compare_command import compare
from pedyra.lab.paper import paper_command

__all__ = ["app", "main"]


def schema(
    kind: Annotated[
        Literal["recipe", "grid"], typer.Argument(help="recipe: of pedyra train. grid: of pedyra compare.")
    ] = "recipe",
) -> None:
    """Print the JSON schema of recipes, for editors."""
    from pedyra.app.recipe import recipe_schema
    from pedyra.lab.compare.grid import grid_schema

    print(json.dumps((recipe_schema if kind == "recipe" else grid_schema)(), indent=2))


app.add_typer(paper_command.app, name="paper")
app.command()(compare)
app.command()(schema)

"""The whole command line: the verbs of `app`, and beside them those that put methods side by side."""

from __future__ import annotations

from pedyra.app.cli import app, main
from pedyra.lab.bench import cli as bench
from pedyra.lab.compare.cli import compare
from pedyra.lab.paper import cli as paper

__all__ = ["app", "main"]

app.add_typer(bench.app, name="bench")
app.add_typer(paper.app, name="paper")
app.command()(compare)

"""The whole command line has the verbs of `app`, and beside them those that put methods side by side."""

from __future__ import annotations

from pedyra.app.cli import app, main
from pedyra.lab.compare.compare_command import compare
from pedyra.lab.paper import paper_command

__all__ = ["app", "main"]


app.add_typer(paper_command.app, name="paper")
app.command()(compare)

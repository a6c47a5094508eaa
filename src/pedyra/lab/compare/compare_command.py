"""`pedyra compare GRID`: parses and prints; the work is in compare.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pedyra.app.console import new_console, quiet_libraries, write_json_lines
from pedyra.app.options import JsonFile, Overrides, TrustRemoteCode

Workers = Annotated[int, typer.Option(metavar="N", min=1, help="Runs at once on this machine.")]


def compare(
    grid: Annotated[Path, typer.Argument(metavar="GRID", help="YAML grid: methods, tasks, seeds.", show_default=False)],
    overrides: Overrides = None,
    workers: Workers = 1,
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
) -> None:
    """Compare methods x tasks x seeds under one protocol; the same command goes on where it was stopped."""
    from pedyra.lab.compare.grid import load_grid

    checked = load_grid(grid, overrides or [])
    quiet_libraries()
    from pedyra.lab.compare.compare import compare_grid

    console = new_console()
    with stoppable(console):
        comparison = compare_grid(checked, workers, console)
    if json_file:
        write_json_lines(json_file, comparison.rows)
    if comparison.failed:
        raise typer.Exit(1)


@contextmanager
def stoppable(console: Console) -> Iterator[None]:
    """Ctrl-C ends the command in one line, with exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("Stopped; running jobs saved a checkpoint. The same command goes on from there.")
        raise typer.Exit(130) from None

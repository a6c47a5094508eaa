"""`pedyra compare GRID`: parses and prints; the work is in compare.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pedyra.app.console import new_console, quiet_libraries, write_json_lines
from pedyra.app.options import JsonFile, Overrides, TrustRemoteCode


def compare(
    grid: Annotated[Path, typer.Argument(metavar="GRID", help="YAML grid: methods, tasks, seeds.", show_default=False)],
    overrides: Overrides = None,
    match: Annotated[str | None, typer.Option(metavar="parameters|rank", help="What is equal for all methods.")] = None,
    workers: Annotated[int, typer.Option(metavar="N", help="Runs at once on this machine.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run on a Ray cluster: host:port, ray://host:port, auto or local."),
    ] = None,
    extend: Annotated[bool, typer.Option("--extend", help="Keep the folder's runs; the grid has grown.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
) -> None:
    """Compare methods x tasks x seeds under one protocol; the same command goes on where it was stopped."""
    from pedyra.lab.compare.grid import load_grid
    from pedyra.lab.compare.machines import Machines

    checked = load_grid(grid, [*(overrides or []), *([f"match={match}"] if match else [])])
    machines = Machines(workers, ray)
    machines.check()
    quiet_libraries()
    from pedyra.lab.compare.compare import compare_grid

    console = new_console()
    try:
        comparison = compare_grid(checked, machines, extend=extend, console=console)
    except KeyboardInterrupt:
        console.print("Stopped; running jobs saved a checkpoint. The same command goes on from there.")
        raise typer.Exit(130) from None
    if json_file:
        write_json_lines(json_file, comparison.rows())
    if comparison.failed:
        raise typer.Exit(1)

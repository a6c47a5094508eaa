"""The commands of all benchmarks share options, how an error is told, and how rows are printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.rows import Row, shown
from pedyra.app.cli import main
from pedyra.app.console import new_console, print_table, quiet_libraries
from pedyra.app.options import json_option


def command_line(command: Callable[..., None], arguments: list[str] | None = None) -> None:
    """Run a benchmark as a command line; a mistake of the user becomes one line, as in `pedyra`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    quiet_libraries()
    main(arguments, app, f"python -m benchmarks.{command.__name__}")


def several(flag: str, default: str, help: str, **more: Any) -> Any:
    """Make an option that may be repeated; `default` is what an empty list stands for."""
    return typer.Option(flag, help=f"{help}; repeat.", show_default=default, **more)


def methods_option(default: str) -> Any:
    """Make the option --method: methods by name, with settings."""
    return several("--method", default, "As in a recipe, settings as NAME:key=value,...: lora+:ratio=4, pedyra:alpha=1")


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


JsonFile = Annotated[
    Path | None,
    json_option("Write each row there when it is done, in the place of one of the same settings; others stay."),
]
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads; default: torch's choice.", min=1, show_default=False, callback=_use_threads),
]
Smoke = Annotated[bool, typer.Option("--smoke", help="Tiny and quick: does it run at all? What is given is kept.")]
Runs = Annotated[list[Path], typer.Argument(help="Finished runs with a LoRA.", show_default=False)]


def print_rows(rows: Sequence[Row], columns: Sequence[str], title: str = "") -> None:
    """Print these fields of the rows as a table."""
    print_table(new_console(), columns, [[shown(row.get(column)) for column in columns] for row in rows], title=title)


def print_done(rows: Iterable[Row], columns: Sequence[str]) -> None:
    """Print these fields of the rows as a table; where one fails, or at Ctrl-C, it has those that are done."""
    finished: list[Row] = []
    try:
        for row in rows:
            finished.append(row)
    finally:
        if finished:
            print_rows(finished, columns)

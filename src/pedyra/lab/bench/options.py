"""Options that several benchmarks have on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pedyra.app.options import json_option

RowsFile = Annotated[
    Path | None, json_option("Append each row there when it is done; rows that it holds are not made again.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice.", min=1, show_default=False)]
Smoke = Annotated[
    bool, typer.Option("--smoke", help="Tiny and quick: does it run at all? Most sizes are its own, whatever is given.")
]
Seeds = Annotated[int, typer.Option(help="Number of seeds.", min=1)]
FirstSeed = Annotated[int, typer.Option("--first-seed", help="The others follow it.", min=0)]


def positive(values: Any) -> Any:
    """The rate, or rates, of --lr; ValueError where one is no rate."""
    for value in values if isinstance(values, list) else [values]:
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--lr is {value}; a learning rate is a finite number above 0")
    return values


def several(flag: str, default: str, help: str = "", **more: Any) -> Any:
    """An option that may be repeated; `default` is what an empty list stands for."""
    return typer.Option(flag, help=f"{help}; repeat." if help else "Repeat.", show_default=default, **more)


def methods(default: str) -> Any:
    """--method: methods by name."""
    known = "As in a recipe, settings as NAME:key=value,...: lora+:ratio=4, pedyra:moves=2, lora:ranks={q=1,v=3}"
    return several("--method", default, known)


def use_threads(threads: int | None) -> None:
    """Have torch compute with so many, if the option was given."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)

"""How the commands print: tables for people, JSON lines for scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]


def new_console(*, stderr: bool = False) -> Console:
    """A console that leaves numbers and paths as they are, without colour guesses."""
    return Console(stderr=stderr, highlight=False)


def write_json_lines(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line; NaN and infinities, which JSON does not have, become null.

    Raises:
        ValueError: the file's folder does not exist.
    """
    if not path.parent.is_dir():
        raise ValueError(f"--json {path}: the folder {path.parent} does not exist; create it first")
    lines = (json.dumps({key: _finite(value) for key, value in row.items()}) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def print_table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> None:
    """A table whose first column is text and whose other columns are numbers."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console.print(table)


def print_rank_map(console: Console, layers: Sequence[Row]) -> None:
    """Ranks as module type (down) x depth (across); layers are `{"type", "depth", "rank"}`.

    A module outside the numbered stack of blocks has no depth and stands in a column of its own, "-".
    """
    depths = sorted({layer["depth"] for layer in layers if layer["depth"] is not None})
    columns = [*depths, *([None] if any(layer["depth"] is None for layer in layers) else [])]
    types = list(dict.fromkeys(layer["type"] for layer in layers))
    ranks: dict[tuple[str, int | None], list[int]] = {}
    for layer in layers:
        ranks.setdefault((layer["type"], layer["depth"]), []).append(layer["rank"])
    rows = [[kind, *("+".join(map(str, ranks.get((kind, depth), ["."]))) for depth in columns)] for kind in types]
    headers = ["rank by depth", *("-" if depth is None else str(depth) for depth in columns)]
    print_table(console, headers, rows)


def format_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def format_seconds(seconds: float) -> str:
    """95 -> "1 min 35 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

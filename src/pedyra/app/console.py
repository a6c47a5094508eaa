"""The commands print tables for people, and JSON lines for scripts."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from pedyra.lora.files import json_line
from pedyra.lora.layer_names import layer_place

if TYPE_CHECKING:
    from pedyra.app.runs.run import RunResult


def new_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Make a console without highlighting and markup; in a file or a pipe its lines are never wrapped."""
    console = Console(stderr=stderr, quiet=quiet, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 10_000
    return console


def write_json_lines(path: Path | None, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, with null for NaN and infinities; without a path nothing is written."""
    if path is not None:
        path.write_text("".join(map(json_line, rows)), encoding="utf-8")


def print_table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> None:
    """Print a table whose first column is text and whose other columns are numbers."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console.print(table)


def print_rank_map(console: Console, layers: Sequence[Mapping[str, Any]]) -> None:
    """Print ranks as module type (down, by name) x depth (across), in as many bands as the width asks for. Layers at
    one place (of an encoder and a decoder, or the experts of a block) share a cell, which has their mean."""
    if not layers:
        return
    places = {layer["layer"]: layer_place(layer["layer"]) for layer in layers}
    depths = sorted({depth for _, depth in places.values()})
    by_kind: dict[str, dict[int, list[int]]] = {}
    for layer in layers:
        kind, depth = places[layer["layer"]]
        by_kind.setdefault(kind, {}).setdefault(depth, []).append(layer["rank"])
    ranks = {kind: {depth: _mean(each) for depth, each in by_depth.items()} for kind, by_depth in by_kind.items()}
    widest = max(len(rank) for by_depth in ranks.values() for rank in (*by_depth.values(), str(depths[-1])))
    room = console.width - max(len("rank by depth"), *map(len, ranks))
    per_band = max(1, room // (widest + 2))  # two blanks between columns
    for start in range(0, len(depths), per_band):
        band = depths[start : start + per_band]
        rows = [[kind, *(by_depth.get(depth, ".") for depth in band)] for kind, by_depth in sorted(ranks.items())]
        print_table(console, ["rank by depth", *map(str, band)], rows)


def _mean(ranks: Sequence[int]) -> str:
    mean = sum(ranks) / len(ranks)
    return f"{mean:.0f}" if mean.is_integer() else f"{mean:.1f}"


def print_plan(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Show the plan of a run, and the ranks that its layers begin with."""
    run, *layers = rows
    lines = [[key.replace("_", " "), value] for key, value in run.items() if value is not None]
    print_table(console, ["plan", ""], lines[1:], title=run["plan"])
    print_rank_map(console, layers)


def print_result(console: Console, result: RunResult) -> None:
    """Print the result of a run: metric, ranks, parameters, files; after an interruption, how to resume."""
    if result.final is None:
        message = f"Stopped after step {result.step} of {result.total_steps}; a checkpoint is saved."
        console.print(f"{message} To go on, {result.goes_on}", soft_wrap=True)
        return
    final = result.final
    print_rank_map(console, result.layers)
    _print_named(console, "metric", f"held-out {final['metric']} {final['value']:.4f}")
    if result.layers:
        ranks, parameters = (
            [sum(layer[key] for layer in layers) for layers in (result.start, result.layers)]
            for key in ("rank", "parameters")
        )
        _print_named(console, "total rank", f"{_change(*ranks)}, in {len(result.layers)} layers")
        _print_named(console, "parameters", _change(*parameters))
    time, peak = format_seconds(final["seconds"]), decimal(final["peak_memory_bytes"])
    _print_named(console, "training", f"{result.step:,} steps in {time}, peak memory {peak}")
    _print_named(console, "adapter", _with_size(result.folder.adapter))
    if result.fit is not None:
        console.print(f"\n{result.fit}", soft_wrap=True, markup=False)
        _print_named(console, "whole" if result.fit.is_whole else "smaller", _with_size(result.folder.path / "fit"))


def print_beside(console: Console, finals: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the last lines of runs' metrics side by side, by the methods' names."""
    names = {"value": str(next(iter(finals.values()))["metric"]), "eval_loss": "held-out loss"}
    names |= {"trainable_parameters": "trainable parameters", "seconds": "seconds of training"}
    print_table(console, ["", *finals], [[name, *(row[key] for row in finals.values())] for key, name in names.items()])


def _print_named(console: Console, name: str, value: str) -> None:
    console.print(f"{name:12}{value}", soft_wrap=True)


def _with_size(adapter: Path) -> str:
    return f"{adapter}, {decimal(sum(file.stat().st_size for file in adapter.glob('adapter_model.*')))}"


def _change(start: int, end: int) -> str:
    return f"{end:,} as at the start" if start == end else f"{start:,} at the start, {end:,} at the end"


def print_adapter(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of `inspect_adapter`: the layers as a table, their ranks as a map, and the totals."""
    *layers, total = rows
    columns = ("layer", "rank", "parameters", "effective_rank")
    print_table(console, columns, [[row[column] for column in columns] for row in rows])
    print_rank_map(console, [layer for layer in layers if layer["rank"] is not None])
    console.print(f"memory      {decimal(total['bytes'])}")
    if total["other_parameters"]:
        console.print(f"beside it   {total['other_parameters']:,} other parameters: a head, biases")


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
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else str(value)


def quiet_libraries() -> None:
    """Turn off the progress bars and advice of libraries; errors still show."""
    warnings.simplefilter("ignore", FutureWarning)  # for developers of libraries
    for chatty in ("bitsandbytes", "huggingface_hub"):  # advice on kernels, every retry of a download
        logging.getLogger(chatty).setLevel(logging.ERROR)

    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()

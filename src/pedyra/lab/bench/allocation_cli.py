"""`pedyra bench planted` and `bench transfer`: who finds the right ranks. Parses and prints, as bench_cli does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pedyra.app.console import new_console, quiet_libraries
from pedyra.lab.bench.options import (
    FirstSeed,
    RowsFile,
    Seeds,
    Smoke,
    Threads,
    methods,
    positive,
    several,
    use_threads,
)


def _known_target(name: str) -> str:
    from pedyra.app.tasks.bytes import TARGETS

    if name not in TARGETS:
        raise ValueError(f"--target is {name!r}; it must be one of {', '.join(TARGETS)}")
    return name


Target = Annotated[str, typer.Option(help="code, or rot13: the same prose in other letters.", callback=_known_target)]


def planted(
    chosen: Annotated[list[str] | None, methods("all")] = None,
    profiles: Annotated[
        list[str] | None, several("--profile", "design", "design, sparse, linear, uniform, random")
    ] = None,
    seeds: Seeds = 5,
    first_seed: FirstSeed = 0,
    noises: Annotated[
        list[float] | None, several("--noise", "0", "Of the targets, by the size of the true change")
    ] = None,
    architectures: Annotated[
        list[str] | None, several("--architecture", "mlp", "mlp (residual layers) or block (transformer blocks)")
    ] = None,
    widths: Annotated[list[int] | None, several("--width", "64", min=1)] = None,
    depths: Annotated[list[int] | None, several("--depth", "12", "Linear layers, six to a block", min=1)] = None,
    rank: Annotated[int, typer.Option(help="The student's uniform rank: its budget.", min=1)] = 4,
    steps: Annotated[int | None, typer.Option(min=1, show_default="1500")] = None,
    lrs: Annotated[list[float] | None, several("--lr", "0.005", "Learning rate", callback=positive)] = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the errors there (.svg, .png).", show_default=False)
    ] = None,
    threads: Threads = None,
    smoke: Smoke = False,
    json_file: RowsFile = None,
) -> None:
    """Let every method look for the ranks of a planted update, and compare with the oracle that knows them."""
    quiet_libraries()
    from pedyra.lab.bench.planted import KEY, Size, bench_planted, every_method
    from pedyra.lab.bench.planted_figure import check_figure_path, save_planted_figure
    from pedyra.lab.bench.planted_summary import summarise_planted, table, title
    from pedyra.lab.bench.row_file import RowFile

    use_threads(threads)
    if figure:
        check_figure_path(figure)
    if smoke:
        seeds, architectures, steps = 1, architectures or ["mlp", "block"], steps or 60
    sizes = [
        Size(architecture=architecture, width=width, depth=depth, rank=rank, steps=steps or Size().steps)
        for architecture in architectures or ["mlp"]
        for width in widths or [64]
        for depth in depths or [12]
    ]
    file = RowFile(json_file, KEY)
    console, rows = new_console(), []
    for row in bench_planted(
        chosen or every_method(),
        profiles or ["design"],
        seeds=range(first_seed, first_seed + seeds),
        noises=noises or [0.0],
        lrs=lrs or [5e-3],
        sizes=sizes,
        file=file,
    ):
        rows.append(row)
        error = "diverged" if row["relative_error"] is None else f"{row['relative_error']:.3g}"
        ranks = " ".join(map(str, row["ranks"] or ["no ranks"]))
        where = f"{row['architecture']}, {row['profile']}, noise {row['noise']:g}, seed {row['seed']}, {ranks}"
        console.print(f"{error}  {row['method']}  {where}, {row['seconds']:.1f} s", soft_wrap=True)
    summaries = summarise_planted(rows)
    for group, methods_of_group in summaries.items():
        console.print(f"\n{title(group)}")
        for line in table(methods_of_group):
            console.print(line, soft_wrap=True)
    if figure:
        save_planted_figure(summaries, figure)
        console.print(f"\nfigure  {figure}", soft_wrap=True)


def transfer(
    chosen: Annotated[list[str] | None, methods("lora, lora+:ratio=4, wide")] = None,
    lrs: Annotated[list[float] | None, several("--lr", "0.008 0.016 0.032", "Learning rate", callback=positive)] = None,
    seeds: Seeds = 2,
    first_seed: FirstSeed = 0,
    ranks: Annotated[list[int] | None, several("--rank", "2", "Rank of the budget", min=1)] = None,
    steps: Annotated[int | None, typer.Option(min=1, show_default="800")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows of 64 bytes.", min=1, show_default="16")] = None,
    target: Target = "code",
    threads: Threads = None,
    smoke: Smoke = False,
    json_file: RowsFile = None,
) -> None:
    """Adapt a byte transformer from prose to another text: held-out loss of every method at equal parameters."""
    quiet_libraries()
    from dataclasses import replace

    from pedyra.lab.bench.bytes import KEY, SMOKE, Size, bench_bytes
    from pedyra.lab.bench.rate_summary import rates_by_method, summarise_rates, table
    from pedyra.lab.bench.row_file import RowFile

    use_threads(threads)
    size = SMOKE if smoke else Size()
    size = replace(size, steps=steps or size.steps, batch=batch or size.batch, target=target)
    file = RowFile(json_file, KEY)
    console = new_console()
    rows = []
    for row in bench_bytes(
        chosen or ["lora", "lora+:ratio=4", "wide"],
        lrs=lrs or [8e-3, 16e-3, 32e-3],
        seeds=range(first_seed, first_seed + seeds),
        ranks=ranks or [2],
        size=size,
        file=file,
    ):
        rows.append(row)
        value = "diverged" if row["loss"] is None else f"{row['loss']:.4f}"
        where = f"r = {row['rank']}, lr {row['lr']:g}, seed {row['seed']}"
        cost = f"{row['parameters']:,} parameters, {row['seconds']:.0f} s"
        console.print(f"{value}  {row['method']}  {where}, {cost}", soft_wrap=True)
    last = rows[-1]
    same = [row for row in file.rows if all(row[name] == last[name] for name in ("steps", "batch", "base"))]
    for rank in sorted({row["rank"] for row in rows}):
        summaries = summarise_rates(rates_by_method([row for row in same if row["rank"] == rank]))
        console.print(f"held-out loss, r = {rank}:")
        for line in table(summaries):
            console.print(line, soft_wrap=True)
        edges = [summary.name for summary in summaries if summary.edge and len(summary.means) > 1]
        if edges:
            console.print(f"! the best rate ends the grid, so widen it: {', '.join(edges)}", soft_wrap=True)

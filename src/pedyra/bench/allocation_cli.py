"""`pedyra bench planted` and `bench transfer`: who finds the right ranks. Parses and prints, as bench_cli does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pedyra.bench.options import (
    FirstSeed,
    RowsFile,
    Seeds,
    Settings,
    Smoke,
    Threads,
    methods,
    positive,
    several,
    use_threads,
)
from pedyra.console import new_console, quiet_libraries


def _known_target(name: str) -> str:
    from pedyra.bench.transfer import TARGETS

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
    settings: Settings = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the errors there (.svg, .png).", show_default=False)
    ] = None,
    threads: Threads = None,
    smoke: Smoke = False,
    json_file: RowsFile = None,
) -> None:
    """Let every allocation look for the ranks of a planted update, and compare with the oracle that knows them."""
    quiet_libraries()
    from pedyra.bench.bench_planted import KEY, METHODS, Size, bench_planted
    from pedyra.bench.planted_figure import check_figure_path, save_planted_figure
    from pedyra.bench.planted_summary import summarise_planted, table, title
    from pedyra.compare.rate_summary import full_name
    from pedyra.compare.row_file import RowFile

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
        chosen or METHODS,
        profiles or ["design"],
        seeds=range(first_seed, first_seed + seeds),
        noises=noises or [0.0],
        lrs=lrs or [5e-3],
        settings=settings or [],
        sizes=sizes,
        file=file,
    ):
        rows.append(row)
        error = "diverged" if row["relative_error"] is None else f"{row['relative_error']:.3g}"
        ranks = " ".join(map(str, row["ranks"]))
        where = f"{row['architecture']}, {row['profile']}, noise {row['noise']:g}, seed {row['seed']}, {ranks}"
        console.print(f"{error}  {full_name(row)}  {where}, {row['seconds']:.1f} s", soft_wrap=True)
    summaries = summarise_planted(rows)
    for group, methods_of_group in summaries.items():
        console.print(f"\n{title(group)}")
        for line in table(methods_of_group):
            console.print(line, soft_wrap=True)
    if figure:
        save_planted_figure(summaries, figure)
        console.print(f"\nfigure  {figure}", soft_wrap=True)


def transfer(
    chosen: Annotated[list[str] | None, methods("lora, lora+4, pedyra")] = None,
    lrs: Annotated[list[float] | None, several("--lr", "0.008 0.016 0.032", "Learning rate", callback=positive)] = None,
    seeds: Seeds = 2,
    first_seed: FirstSeed = 0,
    ranks: Annotated[list[int] | None, several("--rank", "2", "Rank of the budget", min=1)] = None,
    steps: Annotated[int | None, typer.Option(min=1, show_default="800")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows of 64 bytes.", min=1, show_default="16")] = None,
    target: Target = "code",
    settings: Settings = None,
    threads: Threads = None,
    smoke: Smoke = False,
    json_file: RowsFile = None,
) -> None:
    """Adapt a byte transformer from prose to another text: held-out loss of every method at equal parameters."""
    quiet_libraries()
    from dataclasses import replace

    from pedyra.bench.bench_transfer import KEY, SMOKE, Size, bench_transfer
    from pedyra.compare.rate_summary import full_name, rates_by_method, summarise_rates, table
    from pedyra.compare.row_file import RowFile

    use_threads(threads)
    size = SMOKE if smoke else Size()
    size = replace(size, steps=steps or size.steps, batch=batch or size.batch, target=target)
    file = RowFile(json_file, KEY)
    console = new_console()
    rows = []
    for row in bench_transfer(
        chosen or ["lora", "lora+4", "pedyra"],
        lrs=lrs or [8e-3, 16e-3, 32e-3],
        seeds=range(first_seed, first_seed + seeds),
        ranks=ranks or [2],
        settings=settings or [],
        size=size,
        file=file,
    ):
        rows.append(row)
        value = "diverged" if row["loss"] is None else f"{row['loss']:.4f}"
        where = f"r = {row['rank']}, lr {row['lr']:g}, seed {row['seed']}"
        cost = f"{row['parameters']:,} parameters, {row['seconds']:.0f} s"
        console.print(f"{value}  {full_name(row)}  {where}, {cost}", soft_wrap=True)
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


def search(
    lr: Annotated[float, typer.Option(help="Of every run; the best of plain LoRA.", callback=positive)] = 16e-3,
    seeds: Annotated[int, typer.Option(help="Runs per pattern.", min=1)] = 1,
    rank: Annotated[int, typer.Option(help="The uniform rank to start from: its parameters are the budget.")] = 2,
    steps: Annotated[int, typer.Option(help="Of every run.", min=1)] = 300,
    batch: Annotated[int, typer.Option(help="Windows of 64 bytes.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="At most.", min=1)] = 3,
    start: Annotated[
        str | None, typer.Option(help="A pattern to start from, as q=1,k=1,v=3; other types keep --rank.")
    ] = None,
    target: Target = "code",
    threads: Threads = None,
    smoke: Smoke = False,
    json_file: RowsFile = None,
) -> None:
    """Search the best fixed ranks per type of layer on the byte transformer, from short runs of plain LoRA."""
    quiet_libraries()
    from dataclasses import replace

    from pedyra.bench.bench_transfer import KEY, SMOKE, Size, search_static, static_name
    from pedyra.compare.row_file import RowFile

    use_threads(threads)
    size = replace(SMOKE, steps=5) if smoke else replace(Size(), steps=steps, batch=batch)
    size = replace(size, target=target)
    console = new_console()
    for found in search_static(
        lr=lr, seeds=range(seeds), rank=rank, start=start, rounds=rounds, size=size, file=RowFile(json_file, KEY)
    ):
        worth = ", ".join(
            f"{group} {found.gains[group]:.4f} / " + (f"{found.losses[group]:.4f}" if group in found.losses else "-")
            for group in found.pattern
        )
        console.print(f"one rank more gains / one less loses: {worth}", soft_wrap=True)
        state = "better" if found.improved else "nothing better"
        console.print(f"{found.loss:.4f}  {static_name(found.pattern)}  {state}", soft_wrap=True)

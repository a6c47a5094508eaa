"""`pedyra bench planted` and `bench transfer`: who finds the right ranks. Parses and prints, as bench_cli does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pedyra.console import new_console, print_table, quiet_libraries, write_json_lines

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write JSON lines there.", show_default=False)
]
RowsFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Append each row there when it is done; rows that it holds are not made again.",
        show_default=False,
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice.", show_default=False)]
Smoke = Annotated[bool, typer.Option("--smoke", help="Tiny and quick: does it run at all?")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A RankConfig setting for pedyra; repeat.", show_default=False),
]
METHODS_HELP = (
    "lora, pedyra, adalora, ... or a variant: lora+4, pedyra:moves=4,init=gaussian, static:q=1,v=3, only:up,down; "
    "repeat."
)


def planted(
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="Only these; repeat.", show_default="all")
    ] = None,
    profiles: Annotated[
        list[str] | None,
        typer.Option("--profile", help="design, sparse, linear, uniform, random; repeat.", show_default="design"),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0.", min=1)] = 5,
    noises: Annotated[
        list[float] | None, typer.Option("--noise", help="Noise of the targets; repeat.", show_default="0")
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 1500,
    lr: float = 5e-3,
    smoke: Smoke = False,
    json_file: JsonFile = None,
) -> None:
    """Let every allocation look for the ranks of a planted update, and compare with the oracle that knows them."""
    quiet_libraries()
    from pedyra.experiments.bench_planted import COLUMNS, CONTENDERS, bench_planted

    if smoke:
        steps, seeds = 60, 1
    rows = []
    for row in bench_planted(
        methods or list(CONTENDERS),
        profiles or ["design"],
        seeds=range(seeds),
        noises=noises or [0.0],
        steps=steps,
        lr=lr,
    ):
        rows.append(row)
        if json_file:
            write_json_lines(json_file, rows)
    print_table(new_console(), COLUMNS, [[row[column] for column in COLUMNS] for row in rows])


def transfer(
    methods: Annotated[
        list[str] | None, typer.Option("--method", help=METHODS_HELP, show_default="lora, lora+4, pedyra")
    ] = None,
    lrs: Annotated[
        list[float] | None, typer.Option("--lr", help="Learning rate; repeat.", show_default="0.008 0.016 0.032")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.", min=1)] = 2,
    first_seed: Annotated[int, typer.Option("--first-seed", min=0)] = 0,
    ranks: Annotated[
        list[int] | None, typer.Option("--rank", help="Rank of the budget; repeat.", show_default="2", min=1)
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, show_default="800")] = None,
    settings: Settings = None,
    threads: Threads = None,
    smoke: Smoke = False,
    json_file: RowsFile = None,
) -> None:
    """Adapt a byte transformer from prose to code: held-out loss of every method at equal parameters."""
    quiet_libraries()
    from dataclasses import replace

    import torch

    from pedyra.experiments.bench_transfer import KEY, SMOKE, Size, bench_transfer
    from pedyra.experiments.rate_summary import full_name, rates_by_method, summarise_rates, table
    from pedyra.experiments.row_file import RowFile

    if threads:
        torch.set_num_threads(threads)
    size = SMOKE if smoke else Size()
    if steps:
        size = replace(size, steps=steps)
    file = RowFile(json_file, KEY)
    console = new_console()
    rows = []
    for row in bench_transfer(
        methods or ["lora", "lora+4", "pedyra"],
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

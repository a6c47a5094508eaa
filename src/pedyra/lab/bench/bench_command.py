"""`pedyra bench ...`: parses and prints; the numbers come from the modules beside it, which load torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from pedyra.app.console import new_console, print_table, quiet_libraries
from pedyra.app.options import json_option
from pedyra.lab.bench.rows import (
    BOUND_KEY,
    CUTS_KEY,
    FORGETTING_KEY,
    PLANTED_KEY,
    SCALE_KEY,
    SCALE_KEY_OF_SOME,
    SIZES_KEY,
    STEP_KEY,
    TRANSFER_KEY,
    Row,
    RowFile,
    shown,
    summary,
)

app = typer.Typer(
    help="Benchmarks: time and memory of a step, what a cut costs, and allocation against a known answer.",
    no_args_is_help=True,
)


def _several(flag: str, default: str, help: str, **more: Any) -> Any:
    """An option that may be repeated; `default` is what an empty list stands for."""
    return typer.Option(flag, help=f"{help}; repeat.", show_default=default, **more)


def _methods(default: str) -> Any:
    """--method: methods by name, with settings."""
    return _several(
        "--method", default, "As in a recipe, settings as NAME:key=value,...: lora+:ratio=4, pedyra:alpha=1.0"
    )


RowsFile = Annotated[
    Path | None, json_option("Append each row there when it is done; rows that it holds are not made again.")
]
KeptFile = Annotated[
    Path | None,
    json_option("Write each row there when it is done, in the place of one of the same settings; others stay."),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice.", min=1, show_default=False)]
Smoke = Annotated[bool, typer.Option("--smoke", help="Tiny and quick: does it run at all? What is given is kept.")]
Seeds = Annotated[int | None, typer.Option(help="Number of seeds.", min=1, show_default="1 with --smoke, else 5 or 2")]
FirstSeed = Annotated[int, typer.Option("--first-seed", help="The others follow it.", min=0)]
Device = Annotated[Literal["cpu", "cuda"], typer.Option()]
TRANSFER = ("lora", "lora+:ratio=4", "wide")

Runs = Annotated[list[Path], typer.Argument(help="Finished runs with a LoRA.", show_default=False)]


@app.command()
def step(
    models: Annotated[
        list[str] | None, typer.Argument(help="minilm, or llama-WIDTHxDEPTH.", show_default="minilm")
    ] = None,
    methods: Annotated[list[str] | None, _methods("floor, lora, adalora, dora; pedyra with alpha 0.5 and 1")] = None,
    rounds: Annotated[
        int | None, typer.Option(help="So many observed steps are timed, and as many idle ones.", show_default="20")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, show_default="the model's")] = None,
    length: Annotated[int | None, typer.Option(min=1, show_default="the model's")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option()] = "float32",
    device: Device = "cpu",
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Processor time, for a machine that others use.")
    ] = False,
    threads: Threads = None,
    smoke: Smoke = False,
    json_file: KeptFile = None,
) -> None:
    """Time one training step of PE-DyRA against PEFT's methods, step by step in turn."""
    file = RowFile(json_file, STEP_KEY)
    _ready(threads)
    from pedyra.lab.bench.step import DEFAULT, KINDS, LEAST_ROUNDS, Timing, bench_step

    if smoke:
        models, batch, length = models or ["llama-32x1"], batch or 2, length or 16
    if rounds is None:
        rounds = LEAST_ROUNDS if smoke else 20
    timing = Timing(rounds=rounds, batch=batch, length=length, dtype=dtype, device=device, cpu_time=cpu_time)
    rows = list(file.keep(bench_step(models or ["minilm"], methods or DEFAULT, timing)))
    for row in rows:
        row["quartiles"] = "{:.3f} to {:.3f}".format(*row["ratio_quartiles"])
        row |= row.get("ratio_by_kind", {})
    columns = ("model", "variant", "ratio_to_lora", "quartiles", *KINDS, "ratio_to_floor", "peak_bytes")
    _print(new_console(), rows, [*columns, "trainable_parameters", "adjustment_seconds"])


@app.command()
def scale(device: Device = "cpu", threads: Threads = None, smoke: Smoke = False, json_file: KeptFile = None) -> None:
    """Fit how the cost of adaptation grows with layers, rank, triples, sequence length and batch."""
    file = RowFile(json_file, SCALE_KEY, SCALE_KEY_OF_SOME)
    _ready(threads)
    from pedyra.lab.bench.scale import AXES, LARGEST_EXPONENT, MEASURES, SMOKE_AXES, bench_scale

    axes, operations = (SMOKE_AXES, 16) if smoke else (AXES, 512)
    rows, console = list(file.keep(bench_scale(axes, device=device, operations=operations))), new_console()
    _print(console, [row for row in rows if row["kind"] == "size"], ["axis", "value", *MEASURES])
    growths = [row for row in rows if row["kind"] == "fit"]
    _print(console, growths, ["axis", "measure", "exponent"])
    (took,) = [row for row in rows if row["kind"] == "operations"]
    _print(console, [took], ["layers", *(name for name in took if name.endswith("_seconds"))])
    worse = [row for row in growths if row["exponent"] > LARGEST_EXPONENT]
    if worse and not smoke:
        names = ", ".join(f"{row['measure']} over {row['axis']} ({row['exponent']:.2f})" for row in worse)
        console.print(f"grows faster than linearly: {names}")
        raise typer.Exit(1)


@app.command()
def cuts(
    runs: Runs,
    shares: Annotated[
        list[float] | None, _several("--share", "0.5, 0.25, 0.125", "Part of the parameters that is left")
    ] = None,
    rows: Annotated[
        int, typer.Option(min=16, help="Rows to calibrate with. 1.5 times as many held-out rows are measured.")
    ] = 1024,
    threads: Threads = None,
    json_file: KeptFile = None,
) -> None:
    """Cut trained LoRAs to one size in different ways, and measure by how much the loss rises with each."""
    file = RowFile(json_file, CUTS_KEY)
    _ready(threads)
    from pedyra.lab.bench.cuts import SHARES, bench_cuts

    found = file.keep(bench_cuts(runs, shares or SHARES, rows))
    _print_done(found, ["run", "way", "share", "parameters", "increase", "standard_error"])


@app.command()
def bound(
    runs: Runs,
    fits: Annotated[int, typer.Option(min=1, help="Fits, each with held-out rows of its own.")] = 100,
    tolerance: Annotated[float, typer.Option(min=1e-6, max=0.999, help="Part of what was won.")] = 0.01,
    threads: Threads = None,
    json_file: KeptFile = None,
) -> None:
    """Fit trained LoRAs again and again, and count the fits whose size costs no more than their tolerance."""
    file = RowFile(json_file, BOUND_KEY)
    _ready(threads)
    from pedyra.lab.bench.cuts import bench_bound

    columns = ["run", "fits", "within", "kept_whole", "share", "least_share", "most_share", "tolerance"]
    _print_done(file.keep(bench_bound(runs, fits, tolerance)), columns)


@app.command()
def sizes(
    comparison: Annotated[Path, typer.Argument(help="Folder of `pedyra compare` with lora at several budgets.")],
    recoveries: Annotated[
        list[int] | None, _several("--recover", "0, 160", "Steps of recovery after the cut", min=0)
    ] = None,
    rows: Annotated[int, typer.Option(min=16, help="To calibrate and to recover with.")] = 1024,
    threads: Threads = None,
    json_file: KeptFile = None,
) -> None:
    """Cut the largest LoRA of a comparison to the size of each smaller one, and compare it with that."""
    file = RowFile(json_file, SIZES_KEY)
    _ready(threads)
    from pedyra.lab.bench.cuts import bench_sizes

    columns = ["task", "seed", "smaller_rank", "recover_steps", "loss", "lora_loss", "lora_less_cut", "seconds"]
    found = file.keep(bench_sizes(comparison, recoveries or (0, 160), rows))
    _print_done(found, [*columns, "sweep_seconds"])


@app.command()
def forgetting(
    runs: Runs,
    general: Annotated[Path, typer.Option(metavar="ROWS", help="Text that should not be forgotten, in a column text.")],
    rows: Annotated[int, typer.Option(min=16, help="Of training, to calibrate with.")] = 1024,
    threads: Threads = None,
    json_file: KeptFile = None,
) -> None:
    """Cut trained LoRAs so that they forget less, and scale them down; the loss of the task and of general text."""
    file = RowFile(json_file, FORGETTING_KEY)
    _ready(threads)
    from pedyra.app.tasks.sources import read_test_rows
    from pedyra.lab.bench.cuts import bench_forgetting

    texts = read_test_rows(str(general), None, "train", ["text"], "--general")
    made = ({"general": str(general), **row} for row in bench_forgetting(runs, texts, rows))
    _print_done(file.keep(made), ["run", "way", "amount", "loss", "general_loss"])


@app.command()
def planted(
    chosen: Annotated[list[str] | None, _methods("all but qlora, and the oracle")] = None,
    profiles: Annotated[
        list[str] | None, _several("--profile", "design", "design, sparse, linear, uniform, random")
    ] = None,
    seeds: Seeds = None,
    first_seed: FirstSeed = 0,
    noises: Annotated[
        list[float] | None, _several("--noise", "0", "Of the targets, by the size of the true change")
    ] = None,
    architectures: Annotated[
        list[str] | None, _several("--architecture", "mlp", "mlp (residual layers) or block (transformer blocks)")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, show_default="1500")] = None,
    lrs: Annotated[list[float] | None, _several("--lr", "0.005", "Learning rate", min=1e-12)] = None,
    threads: Threads = None,
    smoke: Smoke = False,
    json_file: RowsFile = None,
) -> None:
    """Let every method look for the ranks of a planted update, and compare with the oracle that knows them."""
    file = RowFile(json_file, PLANTED_KEY)
    _ready(threads)
    from pedyra.lab.bench.planted import SMOKE_STEPS, bench_planted, every_method, summarise_planted

    console, rows = new_console(), []
    for row in bench_planted(
        chosen or every_method(),
        profiles=profiles or ["design"],
        seeds=range(first_seed, first_seed + (seeds or (1 if smoke else 5))),
        noises=noises or [0.0],
        lrs=lrs or [5e-3],
        architectures=architectures or ["mlp"],
        steps=steps or (SMOKE_STEPS if smoke else 1500),
        file=file,
    ):
        rows.append(row)
        ranks = " ".join(map(str, row["ranks"] or ["no ranks"]))
        where = f"{row['architecture']}, {row['profile']}, noise {row['noise']:g}, seed {row['seed']}, {ranks}"
        _print_row(console, row, "relative_error", where)
    for title, lines in summarise_planted(rows).items():
        console.print()
        _print(console, lines, list(lines[0]), title)


@app.command()
def transfer(
    chosen: Annotated[list[str] | None, _methods(", ".join(TRANSFER))] = None,
    lrs: Annotated[list[float] | None, _several("--lr", "0.008 0.016 0.032", "Learning rate", min=1e-12)] = None,
    seeds: Seeds = None,
    first_seed: FirstSeed = 0,
    ranks: Annotated[list[int] | None, _several("--rank", "2", "Rank of the budget", min=1)] = None,
    steps: Annotated[int | None, typer.Option(min=1, show_default="800")] = None,
    target: Annotated[Literal["code", "rot13"], typer.Option(help="rot13: the same prose in other letters.")] = "code",
    threads: Threads = None,
    smoke: Smoke = False,
    json_file: RowsFile = None,
) -> None:
    """Adapt a byte transformer from prose to another text: held-out loss of every method, given one budget."""
    file = RowFile(json_file, TRANSFER_KEY)
    _ready(threads)
    from dataclasses import replace

    from pedyra.lab.bench.transfer import SMOKE, TransferSize, bench_transfer

    size = SMOKE if smoke else TransferSize()
    console, rows = new_console(), []
    for row in bench_transfer(
        chosen or TRANSFER,
        lrs=lrs or [8e-3, 16e-3, 32e-3],
        seeds=range(first_seed, first_seed + (seeds or (1 if smoke else 2))),
        ranks=ranks or [2],
        size=replace(size, steps=steps or size.steps, target=target),
        file=file,
    ):
        rows.append(row)
        where = f"r = {row['rank']}, lr {row['lr']:g}, seed {row['seed']}, {row['parameters']:,} parameters"
        _print_row(console, row, "loss", where)
    for rank in sorted({row["rank"] for row in rows}):
        lines = summary([row for row in rows if row["rank"] == rank], "loss")
        _print(console, lines, list(lines[0]), f"held-out loss, r = {rank}")
        if edges := [line["method"] for line in lines if line["edge"]]:
            console.print(f"! the best rate ends the grid, so widen it: {', '.join(edges)}", soft_wrap=True)


def _ready(threads: int | None) -> None:
    """Load the libraries, and have torch compute with so many threads, if the option was given."""
    quiet_libraries()
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _print(console: Console, rows: Sequence[Row], columns: Sequence[str], title: str = "") -> None:
    """These fields of the rows, as a table."""
    print_table(console, columns, [[shown(row.get(column)) for column in columns] for row in rows], title=title)


def _print_done(rows: Iterable[Row], columns: Sequence[str]) -> None:
    """These fields of the rows, as a table. Where one fails, or at Ctrl-C, it has those that are done."""
    found: list[Row] = []
    try:
        for row in rows:
            found.append(row)
    finally:
        if found:
            _print(new_console(), found, columns)


def _print_row(console: Console, row: Row, value: str, where: str) -> None:
    """What a run reached, as soon as it is done."""
    reached = "diverged" if row[value] is None else f"{row[value]:.4g}"
    console.print(f"{reached}  {row['method']}  {where}, {row['seconds']:.1f} s", soft_wrap=True)

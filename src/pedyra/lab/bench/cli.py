"""`pedyra bench ...`: parses and prints; the numbers come from the modules beside it, which load torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from pedyra.app.console import new_console, print_table, quiet_libraries, write_json_lines
from pedyra.app.options import JsonFile, json_option
from pedyra.lab.bench.names import check_methods, model_shape
from pedyra.lab.bench.rows import RowFile

app = typer.Typer(
    help="Benchmarks: step time, memory and growth; allocation against a known answer.", no_args_is_help=True
)


def _several(flag: str, default: str, help: str = "", **more: Any) -> Any:
    """An option that may be repeated; `default` is what an empty list stands for."""
    return typer.Option(flag, help=f"{help}; repeat." if help else "Repeat.", show_default=default, **more)


def _methods(default: str, *more: str) -> Any:
    """--method: methods by name, which are checked at once, and what else may be named."""
    known = "As in a recipe, settings as NAME:key=value,...: lora+:ratio=4, pedyra:alpha=1.0, lora:ranks={q=1,v=3}"
    return _several("--method", default, known, callback=_each(lambda text: check_methods([text], *more)))


def _each(check: Callable[[Any], object]) -> Callable[[Any], Any]:
    """A callback that checks every value of an option, before the seconds that the libraries take."""

    def checked(values: Any) -> Any:
        for value in values or ():
            check(value)
        return values

    return checked


def _positive(rate: float) -> None:
    if not 0 < rate < float("inf"):
        raise ValueError(f"--lr is {rate}; a learning rate is a finite number above 0")


def _run_folder(path: Path) -> None:
    if not (path / "recipe.yaml").is_file():
        raise ValueError(f"{path} is no run folder (it has no recipe.yaml); give the output_dir of a training run")


RowsFile = Annotated[
    Path | None, json_option("Append each row there when it is done; rows that it holds are not made again.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice.", min=1, show_default=False)]
Smoke = Annotated[bool, typer.Option("--smoke", help="Tiny and quick: does it run at all? What is given is kept.")]
Seeds = Annotated[int | None, typer.Option(help="Number of seeds.", min=1, show_default="1 with --smoke, else 5 or 2")]
FirstSeed = Annotated[int, typer.Option("--first-seed", help="The others follow it.", min=0)]
Rates = Annotated[list[float] | None, _several("--lr", "0.005", "Learning rate", callback=_each(_positive))]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


@app.command()
def step(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="minilm, smollm2, llama-WIDTHxDEPTH, deberta-WIDTHxDEPTH.",
            show_default="minilm",
            callback=_each(model_shape),
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        _methods("floor, lora, adalora, dora, direct; pedyra with alpha 0.5 and 1, fused and not", "floor", "direct"),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Half of the timed steps: observed ones, and idle ones.", show_default="20")
    ] = None,
    rank: Annotated[int, typer.Option(min=1)] = 8,
    batch: Annotated[int | None, typer.Option(min=1, show_default="the model's")] = None,
    length: Annotated[int | None, typer.Option(min=1, show_default="the model's")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Device = "cpu",
    run_steps: Annotated[int, typer.Option(min=10, help="Length of the run whose mean step is reported.")] = 1000,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Processor time, for a machine that others use.")
    ] = False,
    threads: Threads = None,
    smoke: Smoke = False,
    json_file: JsonFile = None,
) -> None:
    """Time one training step of PE-DyRA against PEFT's methods, step by step in turn."""
    _ready(threads)
    from pedyra.lab.bench.step import COLUMNS, DEFAULT, KINDS, LEAST_ROUNDS, Setting, bench_step

    if smoke:
        models, rounds = models or ["llama-32x1", "deberta-32x1"], rounds or LEAST_ROUNDS
        batch, length = batch or 2, length or 16
    setting = Setting(
        rounds=rounds or 20, rank=rank, batch=batch, length=length, dtype=dtype, device=device,
        run_steps=run_steps, cpu_time=cpu_time,
    )  # fmt: skip
    rows = _kept(json_file, bench_step(models or ["minilm"], methods or DEFAULT, setting))
    table = [["" if row[column] is None else row[column] for column in COLUMNS] for row in rows]
    print_table(new_console(), list(COLUMNS.values()), table)
    apart = [row for row in rows if "ratio_by_kind" in row]
    if apart:
        table = [[row["model"], row["variant"], *(row["ratio_by_kind"][kind] for kind in KINDS)] for row in apart]
        print_table(new_console(), ["by lora, by kind of step", "", *KINDS], table)


@app.command()
def scale(
    device: Device = "cpu",
    threads: Threads = None,
    smoke: Smoke = False,
    json_file: JsonFile = None,
) -> None:
    """Fit how the cost of adaptation grows with layers, rank, triples, sequence length and batch."""
    _ready(threads)
    from pedyra.lab.bench.scale import LARGEST_EXPONENT, MEASURES, SMOKE, bench_scale

    rows = _kept(json_file, bench_scale(**SMOKE if smoke else {}, device=device))
    console = new_console()
    sizes = [row for row in rows if row["kind"] == "size"]
    columns = ["axis", "value", *MEASURES]
    print_table(console, columns, [[row[name] for name in columns] for row in sizes])
    fits = [row for row in rows if row["kind"] == "fit"]
    print_table(console, ["growth", "exponent"], [[f"{r['axis']}: {r['measure']}", r["exponent"]] for r in fits])
    for row in rows:
        if row["kind"] == "operations":
            print_table(console, [f"{row['layers']} layers", "seconds"],
                        [[name, value] for name, value in row.items() if name.endswith("_seconds")])  # fmt: skip
    columns = ["layers", "triples", "removed", "adjustment_seconds"]
    deep = [[row[name] for name in columns] for row in rows if row["kind"] == "adjustment"]
    print_table(console, columns, deep)
    worse = [row for row in fits if row["exponent"] > LARGEST_EXPONENT]
    if worse and not smoke:
        names = ", ".join(f"{row['measure']} over {row['axis']} ({row['exponent']:.2f})" for row in worse)
        console.print(f"grows faster than linearly: {names}")
        raise typer.Exit(1)


@app.command()
def cuts(
    runs: Annotated[
        list[Path], typer.Argument(help="Finished runs with a LoRA.", show_default=False, callback=_each(_run_folder))
    ],
    shares: Annotated[
        list[float] | None, _several("--share", "0.5, 0.25, 0.125", "Part of the parameters that is left")
    ] = None,
    rows: Annotated[int, typer.Option(min=16, help="To calibrate with; 1.5 times are measured on.")] = 1024,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Cut trained LoRAs to one size in different ways, and measure by how much the loss rises with each."""
    _ready(threads)
    from pedyra.lab.bench.cuts import SHARES, bench_cuts

    found = _kept(json_file, bench_cuts(runs, shares or SHARES, rows))
    columns = ["run", "way", "share", "parameters", "cost", "standard_error"]
    print_table(new_console(), columns, [[row[name] for name in columns] for row in found])


@app.command()
def bound(
    runs: Annotated[
        list[Path], typer.Argument(help="Finished runs with a LoRA.", show_default=False, callback=_each(_run_folder))
    ],
    fits: Annotated[int, typer.Option(min=1, help="Fits, each with held-out rows of its own.")] = 100,
    tolerance: Annotated[float, typer.Option(min=1e-6, max=0.999, help="Part of what was won.")] = 0.01,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Fit trained LoRAs again and again, and count the fits whose size costs no more than their tolerance."""
    _ready(threads)
    from pedyra.lab.bench.bound import bench_bound

    found = _kept(json_file, bench_bound(runs, fits, tolerance))
    columns = ["run", "fits", "within", "kept_whole", "share", "least_share", "most_share", "tolerance"]
    print_table(new_console(), columns, [[row[name] for name in columns] for row in found])


@app.command()
def planted(
    chosen: Annotated[list[str] | None, _methods("all", "oracle")] = None,
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
    lrs: Rates = None,
    threads: Threads = None,
    smoke: Smoke = False,
    json_file: RowsFile = None,
) -> None:
    """Let every method look for the ranks of a planted update, and compare with the oracle that knows them."""
    from pedyra.lab.bench.rows import PLANTED_KEY

    file = RowFile(json_file, PLANTED_KEY)
    _ready(threads)
    from pedyra.lab.bench.planted import Problems, bench_planted, every_method, summarise_planted
    from pedyra.lab.bench.rates import shown

    problems = Problems(
        profiles=profiles or ["design"],
        seeds=range(first_seed, first_seed + (seeds or (1 if smoke else 5))),
        noises=noises or [0.0],
        lrs=lrs or [5e-3],
        architectures=architectures or ["mlp"],
        steps=steps or (SMOKE_STEPS if smoke else Problems.steps),
    )
    console, rows = new_console(), []
    for row in bench_planted(chosen or every_method(), problems, file):
        rows.append(row)
        error = "diverged" if row["relative_error"] is None else f"{row['relative_error']:.3g}"
        ranks = " ".join(map(str, row["ranks"] or ["no ranks"]))
        where = f"{row['architecture']}, {row['profile']}, noise {row['noise']:g}, seed {row['seed']}, {ranks}"
        console.print(f"{error}  {row['method']}  {where}, {row['seconds']:.1f} s", soft_wrap=True)
    for title, lines in summarise_planted(rows).items():
        console.print()
        print_table(console, list(lines[0]), [list(map(shown, line.values())) for line in lines], title=title)


SMOKE_STEPS = 24
"""Of `bench planted --smoke`: the fewest in which every method does what it does."""
TRANSFER = ("lora", "lora+:ratio=4", "wide")
TARGETS = ("code", "rot13")


def _known_target(name: str) -> str:
    if name not in TARGETS:
        raise ValueError(f"--target is {name!r}; it must be one of {', '.join(TARGETS)}")
    return name


@app.command()
def transfer(
    chosen: Annotated[list[str] | None, _methods(", ".join(TRANSFER))] = None,
    lrs: Annotated[
        list[float] | None, _several("--lr", "0.008 0.016 0.032", "Learning rate", callback=_each(_positive))
    ] = None,
    seeds: Seeds = None,
    first_seed: FirstSeed = 0,
    ranks: Annotated[list[int] | None, _several("--rank", "2", "Rank of the budget", min=1)] = None,
    steps: Annotated[int | None, typer.Option(min=1, show_default="800")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows of 64 bytes.", min=1, show_default="16")] = None,
    target: Annotated[
        str, typer.Option(help="code, or rot13: the same prose in other letters.", callback=_known_target)
    ] = "code",
    threads: Threads = None,
    smoke: Smoke = False,
    json_file: RowsFile = None,
) -> None:
    """Adapt a byte transformer from prose to another text: held-out loss of every method at equal parameters."""
    from pedyra.lab.bench.rows import TRANSFER_KEY

    file = RowFile(json_file, TRANSFER_KEY)
    _ready(threads)
    from dataclasses import replace

    from pedyra.lab.bench.rates import rates_by_method, shown, summarise_rates
    from pedyra.lab.bench.transfer import SMOKE, Size, bench_transfer

    size = SMOKE if smoke else Size()
    size = replace(size, steps=steps or size.steps, batch=batch or size.batch, target=target)
    console, rows = new_console(), []
    for row in bench_transfer(
        chosen or TRANSFER,
        lrs=lrs or [8e-3, 16e-3, 32e-3],
        seeds=range(first_seed, first_seed + (seeds or (1 if smoke else 2))),
        ranks=ranks or [2],
        size=size,
        file=file,
    ):
        rows.append(row)
        value = "diverged" if row["loss"] is None else f"{row['loss']:.4f}"
        where = f"r = {row['rank']}, lr {row['lr']:g}, seed {row['seed']}"
        took = f"{row['parameters']:,} parameters, {row['seconds']:.0f} s"
        console.print(f"{value}  {row['method']}  {where}, {took}", soft_wrap=True)
    last = rows[-1]
    same = [row for row in file.rows if all(row[name] == last[name] for name in ("steps", "batch", "base"))]
    for rank in sorted({row["rank"] for row in rows}):
        lines = summarise_rates(rates_by_method([row for row in same if row["rank"] == rank]))
        title = f"held-out loss, r = {rank}"
        print_table(console, list(lines[0]), [list(map(shown, line.values())) for line in lines], title=title)
        if edges := [line["method"] for line in lines if line["edge"]]:
            console.print(f"! the best rate ends the grid, so widen it: {', '.join(edges)}", soft_wrap=True)


def _ready(threads: int | None) -> None:
    """Load the libraries, and have torch compute with so many threads, if the option was given."""
    quiet_libraries()
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _kept(file: Path | None, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows; each is in the file as soon as it is there, so that a benchmark that is stopped leaves what it has."""
    kept = []
    for row in rows:
        kept.append(row)
        if file:
            write_json_lines(file, kept)
    return kept

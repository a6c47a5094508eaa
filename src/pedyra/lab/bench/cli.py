"""`pedyra bench ...`: speed, memory and growth. Parses and prints; the numbers come from the modules beside it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from pedyra.app.console import new_console, print_table, quiet_libraries, write_json_lines
from pedyra.app.options import JsonFile
from pedyra.lab.bench.allocation_cli import planted, transfer
from pedyra.lab.bench.options import Smoke, Threads, several, use_threads

app = typer.Typer(
    help="Benchmarks: step time, memory and growth; allocation against a known answer.", no_args_is_help=True
)


@app.command()
def step(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="minilm, smollm2, llama-WIDTHxDEPTH, deberta-WIDTHxDEPTH.", show_default="minilm"),
    ] = None,
    variants: Annotated[
        list[str] | None,
        several("--variant", "all but eva", "floor, lora, adalora, dora, direct, pedyra, pedyra-fused, eva ..."),
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="Half of the timed steps: pedyra observes in the first half, and is idle in the other.")
    ] = 20,
    rank: Annotated[int, typer.Option(min=1)] = 8,
    batch: Annotated[int | None, typer.Option(min=1, show_default="the model's")] = None,
    length: Annotated[int | None, typer.Option(min=1, show_default="the model's")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing")] = False,
    run_steps: Annotated[int, typer.Option(min=10, help="Length of the run whose mean step is reported.")] = 1000,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Processor time, for a machine that others use.")
    ] = False,
    threads: Threads = None,
    smoke: Smoke = False,
    json_file: JsonFile = None,
) -> None:
    """Time one training step of pedyra against PEFT's methods, step by step in turn."""
    quiet_libraries()
    from pedyra.lab.bench.bench_step import COLUMNS, bench_step
    from pedyra.lab.bench.bench_variants import VARIANTS

    use_threads(threads)
    if smoke:
        models, rounds, batch, length = ["llama-32x1", "deberta-32x1"], 10, 2, 16
    rows = _kept(json_file, bench_step(
        models or ["minilm"], variants=variants or VARIANTS, rounds=rounds, rank=rank, batch=batch, length=length,
        dtype=dtype, device=device, gradient_checkpointing=gradient_checkpointing, run_steps=run_steps,
        cpu_time=cpu_time,
    ))  # fmt: skip
    table = [["" if row[column] is None else row[column] for column in COLUMNS] for row in rows]
    print_table(new_console(), list(COLUMNS.values()), table)
    apart = [row for row in rows if "ratio_by_kind" in row]
    if apart:
        kinds = list(apart[0]["ratio_by_kind"])
        table = [[row["model"], row["variant"], *(row["ratio_by_kind"][kind] for kind in kinds)] for row in apart]
        print_table(new_console(), ["by lora, by kind of step", "", *kinds], table)


@app.command()
def scale(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Threads = None,
    smoke: Smoke = False,
    json_file: JsonFile = None,
) -> None:
    """Fit how the cost of adaptation grows with layers, rank, triples, sequence length and batch."""
    quiet_libraries()
    from pedyra.lab.bench.bench_scale import LARGEST_EXPONENT, MEASURES, SMOKE, bench_scale

    use_threads(threads)
    rows = _kept(json_file, bench_scale(**SMOKE if smoke else {}, device=device))
    console = new_console()
    sizes = [row for row in rows if row["kind"] == "size"]
    columns = ["axis", "value", *MEASURES]
    print_table(console, columns, [[row[name] for name in columns] for row in sizes])
    fits = [row for row in rows if row["kind"] == "fit"]
    table = [[f"{row['axis']}: {row['measure']}", row["exponent"]] for row in fits]
    print_table(console, ["growth", "exponent"], table)
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
    runs: Annotated[list[Path], typer.Argument(help="Finished runs with a LoRA.", show_default=False)],
    shares: Annotated[
        list[float] | None, several("--share", "0.5, 0.25, 0.125", "Part of the parameters that is left")
    ] = None,
    rows: Annotated[int, typer.Option(min=16, help="To calibrate with; 1.5 times are measured on.")] = 1024,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Cut trained LoRAs to one size in different ways, and measure what each costs."""
    quiet_libraries()
    from pedyra.lab.bench.bench_cuts import SHARES, bench_cuts

    use_threads(threads)
    found = _kept(json_file, bench_cuts(runs, shares or SHARES, rows))
    columns = ["run", "way", "share", "parameters", "cost", "standard_error"]
    print_table(new_console(), columns, [[row[name] for name in columns] for row in found])


def _kept(file: Path | None, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows; each is in the file as soon as it is there, so that a benchmark that is stopped leaves what it has."""
    kept = []
    for row in rows:
        kept.append(row)
        if file:
            write_json_lines(file, kept)
    return kept


app.command()(planted)
app.command()(transfer)

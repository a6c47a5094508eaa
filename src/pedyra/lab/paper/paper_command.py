"""`pedyra paper` has the paper's tables and figures as commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pedyra.app.console import new_console, print_table, quiet_libraries, write_json_lines
from pedyra.app.options import JsonFile
from pedyra.lab.compare.compare_command import Cpus, DryRun, Gpus, Ray, Retries, Workers, engine, stoppable

app = typer.Typer(
    help="The paper's tables and figures, measured again beside the published numbers.", no_args_is_help=True
)


DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        envvar="PEDYRA_DATA_DIR",
        help="Data in DIR/<task>/<split>.jsonl.gz, e.g. sst2/train.jsonl.gz. Default: the Hugging Face Hub.",
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="NAME=PATH",
        envvar="PEDYRA_MODELS",
        help="Load PATH where a recipe names the model NAME; may be given several times.",
    ),
]


@app.command("list")
def list_items(json_file: JsonFile = None) -> None:
    """List every table and figure, and what it needs at each scale."""
    from pedyra.lab.paper.item import items

    rows, lines = [], []
    for item in items().values():
        for scale, at in item.scales.items():
            row = {"id": item.id, "title": item.title, "scale": scale, **item.needs(scale)}
            rows.append({**row, "gpu_gb": at.gpu_gb, "hours": at.hours, "seeds": len(at.seeds)})
        full, small = item.scales["full"], item.scales["small"]
        models = ", ".join(item.needs("full")["model"])
        lines.append([item.id, models, f"{full.gpu_gb:g}", f"{full.hours:g}", f"{small.hours:g}", item.title])
    columns = ["id", "models, full", "GPU GB, full", "hours a seed, full", "hours a seed, small", "title"]
    print_table(new_console(), columns, lines, title="What each needs; costs are estimates")
    write_json_lines(json_file, rows)


@app.command()
def run(
    name: Annotated[str, typer.Argument(metavar="ID", help="table2, figure1a, ...; see pedyra paper list.")],
    scale: Annotated[
        Literal["full", "small", "smoke"],
        typer.Option(help="full: as published. small: on a laptop. smoke: tiny random models, in seconds."),
    ] = "full",
    workers: Workers = 1,
    ray: Ray = None,
    gpus: Gpus = None,
    cpus: Cpus = 1.0,
    retries: Retries = 3,
    dry_run: DryRun = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Its runs are shared by all ids of a scale.")] = Path(
        "runs/paper"
    ),
    data_dir: DataDir = None,
    models: Models = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run the programs that a model wrote, in a sandbox.")
    ] = False,
    rows: Annotated[list[str] | None, typer.Option("--row", help="Only this row; may be given several times.")] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--column", help="Only this column; may be given several times.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure a table or figure; what is finished is kept, so the same command goes on after a stop."""
    from pedyra.lab.paper.item import get_item
    from pedyra.lab.paper.places import Places

    item, places = get_item(name).only(rows or (), columns or ()), Places.parse(data_dir, models or [])
    item.check(scale, allow_code_execution=allow_code_execution)
    quiet_libraries()
    from pedyra.lab.compare.tables import print_tables
    from pedyra.lab.paper.item_results import remarks, result_tables
    from pedyra.lab.paper.run_item import plan_item, run_item

    console = new_console()
    if dry_run:
        console.print(f"{item.id}: {plan_item(item, scale, out, places)}", soft_wrap=True)
        return
    with stoppable(console):
        where = engine(ray, workers, gpus, cpus, retries, console)
        measurement = run_item(item, scale, out, places, where, allow_code_execution, console)
    item = item.at(scale)
    print_tables(console, result_tables(item, scale, measurement.results))
    for remark in remarks(item, scale, measurement.results):
        console.print(f"- {remark}", soft_wrap=True)
    for file in measurement.files:
        console.print(f"written     {file}", soft_wrap=True)
    write_json_lines(json_file, measurement.results)
    for failure in measurement.failed:
        console.print(f"failed      {failure}", soft_wrap=True)
    if measurement.failed:
        raise typer.Exit(1)

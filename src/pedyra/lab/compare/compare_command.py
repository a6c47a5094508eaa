"""`pedyra compare GRID`: parses and prints; the work is in compare.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pedyra.app.console import new_console, quiet_libraries, write_json_lines
from pedyra.app.options import JsonFile, Overrides, TrustRemoteCode

if TYPE_CHECKING:
    from pedyra.lab.compare.jobs import Engine

Workers = Annotated[int, typer.Option(metavar="N", min=1, help="Runs at once on this machine, without --ray.")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check the grid and its data, print how many runs there are and how long they take, train none.",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Train on a Ray cluster: auto, ray://HOST:PORT, or local, which starts one here.",
        show_default=False,
    ),
]
Gpus = Annotated[
    float | None,
    typer.Option(min=0, help="With --ray: of each run.", show_default="1 where the cluster has any"),
]
Cpus = Annotated[float, typer.Option(min=0, help="With --ray: of each run.")]
Retries = Annotated[int, typer.Option(min=0, help="With --ray: new starts of a run whose node has died.")]


def compare(
    grid: Annotated[Path, typer.Argument(metavar="GRID", help="YAML grid: methods, tasks, seeds.", show_default=False)],
    overrides: Overrides = None,
    workers: Workers = 1,
    ray: Ray = None,
    gpus: Gpus = None,
    cpus: Cpus = 1.0,
    retries: Retries = 3,
    dry_run: DryRun = False,
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
) -> None:
    """Compare methods x tasks x seeds under one protocol; the same command goes on where it was stopped."""
    from pedyra.lab.compare.grid import load_grid

    content = load_grid(grid, overrides or [])
    quiet_libraries()
    from pedyra.lab.compare.compare import compare_experiment, open_experiment
    from pedyra.lab.compare.plan import plan_experiment

    console, experiment = new_console(), open_experiment(content)
    if dry_run:
        console.print(f"{content.name}: {plan_experiment(experiment)}", soft_wrap=True)
        return
    with stoppable(console):
        comparison = compare_experiment(experiment, engine(ray, workers, gpus, cpus, retries, console), console)
    write_json_lines(json_file, comparison.rows)
    if comparison.failed:
        raise typer.Exit(1)


def engine(ray: str | None, workers: int, gpus: float | None, cpus: float, retries: int, console: Console) -> Engine:
    """Return the engine of these options; print what a cluster has."""
    if ray is None:
        from pedyra.lab.compare.jobs import ThisMachine

        return ThisMachine(workers)
    from pedyra.lab.compare.ray_engine import RayCluster

    cluster = RayCluster(ray, gpus=gpus, cpus=cpus, retries=retries)
    console.print(f"ray         {cluster.summary}", soft_wrap=True)
    return cluster


@contextmanager
def stoppable(console: Console) -> Iterator[None]:
    """Ctrl-C ends the command in one line, with exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("Stopped; running jobs saved a checkpoint. The same command goes on from there.")
        raise typer.Exit(130) from None

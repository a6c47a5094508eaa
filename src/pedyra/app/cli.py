"""The command line: each verb parses, calls one function of the package, and prints what it returns.

Anything heavy is imported inside a verb, so that `--help` answers at once. Exit codes: 0; 2 for a mistake that the
message lets the user repair; 1, with a traceback, for a mistake of ours; 130 after Ctrl-C. What `prove` says: 0, 1, 3.
"""

from __future__ import annotations

import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperGroup

from pedyra.app.console import (
    new_console,
    print_adapter,
    print_beside,
    print_plan,
    print_result,
    print_table,
    quiet_libraries,
    write_json_lines,
)
from pedyra.app.options import (
    Data,
    Dtype,
    FolderArgument,
    ForPlace,
    JsonFile,
    MaxLength,
    Overrides,
    Overwrite,
    Quantization,
    Run,
    RunArgument,
    TrustRemoteCode,
    field_option,
    place_of,
)
from pedyra.app.runs.run_folder import RunFolder
from pedyra.app.runs.source import Source
from pedyra.errors import UserError
from pedyra.fitting.request import FitRequest
from pedyra.lora.files import is_disk_full

SEVERAL = " May be given several times."
ORDER = ("train", "fit", "prove", "compare", "paper", "report", "eval", "inspect", "export", "resize", "schema")


class Ordered(TyperGroup):
    """What most people want comes first in the help."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    name="pedyra",
    cls=Ordered,
    help="The ranks of a LoRA: PE-DyRA and its rivals move them while it trains, and fit proves how few are enough.",
    epilog="A recipe is one training run as YAML: pedyra schema lists its keys, and the folder recipes of "
    "the repository has examples.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"pedyra {version('pedyra')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from pedyra.app.recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe.", show_default=False)],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, train nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its last checkpoint.")] = False,
    beside: Annotated[
        Path | None, typer.Option(help="A finished run, whose result is printed beside this one's.", metavar="RUN")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
) -> None:
    """Train one recipe into a run folder; also under torchrun and accelerate launch, as -m pedyra train."""
    from pedyra.app.recipe import load_recipe
    from pedyra.app.runs.processes import is_first

    console = new_console(quiet=not is_first())
    content = load_recipe(recipe, overrides or [])
    # Before the seconds that torch takes to load.
    RunFolder(Path(content.output_dir)).check(overwrite=overwrite, resume=resume)
    others = {} if beside is None else {load_recipe(beside / "recipe.yaml").method.name: RunFolder(beside).result()}

    quiet_libraries()
    if dry_run:
        from pedyra.app.runs.plan import plan_run

        plan = plan_run(content, overwrite=overwrite, resume=resume)
        print_plan(console, plan)
        return write_json_lines(json_file if is_first() else None, plan)

    from pedyra.app.report.page import build_report
    from pedyra.app.runs.run import train_run

    result = train_run(content, overwrite=overwrite, resume=resume, console=console)
    print_result(console, result)
    if result.interrupted:
        raise typer.Exit(130)
    if others and result.final is not None:
        print_beside(console, {content.method.name: result.final, **others})
    if is_first():
        console.print(f"report      {build_report(result.folder.path)}", soft_wrap=True)
        write_json_lines(json_file, result.rows())
    if result.awaits_fit:
        command = f"pedyra fit {shlex.quote(str(result.folder.path))}   finds out how small the adapter may be"
        console.print(f"next        {command}", soft_wrap=True)
    if result.diverged:
        console.print("The loss is no finite number: this run diverged. Lower training.learning_rate.", soft_wrap=True)
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    run: RunArgument,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run the code that the model writes, in a sandbox.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
) -> None:
    """Judge a run's saved adapter again on its held-out rows, and on the test sets of its recipe's `generate`."""
    quiet_libraries()
    from pedyra.app.runs.evaluate import evaluate_run

    console = new_console()
    metrics = evaluate_run(run, console=console, allow_code_execution=allow_code_execution)
    rows = [{"metric": name, "value": value} for name, value in metrics.items()]
    print_table(console, ["metric", "value"], [list(row.values()) for row in rows])
    write_json_lines(json_file, rows)


@app.command()
def inspect(path: FolderArgument, json_file: JsonFile = None) -> None:
    """Show ranks, parameters, effective ranks and memory of an adapter."""
    from pedyra.lora.inspection import inspect_adapter

    rows = inspect_adapter(path)
    print_adapter(new_console(), rows)
    write_json_lines(json_file, rows)


@app.command()
def export(
    run: FolderArgument,
    target: Annotated[
        Literal["peft", "padded", "gguf", "merged"] | None,
        typer.Option(
            help="peft: each layer's own rank, for PEFT. padded: one rank everywhere, for any reader. gguf: for "
            "llama.cpp's converter. merged: the base model with the update in its weights.",
        ),
    ] = None,
    destination: ForPlace = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: RUN/export/TARGET or PLACE.")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Of merged: another base than the adapter's own.")
    ] = None,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write an adapter in the form that another program reads."""
    if (target is None) == (destination is None):
        raise UserError("give the form, --target, or the place where the adapter will be served, --for: one of the two")
    place = place_of(destination)
    quiet_libraries()
    from pedyra.app.runs.export import export_folder
    from pedyra.app.runs.served import served_together, serving_lines, with_label
    from pedyra.lora.files import refuse_link
    from pedyra.lora.folder import read_lora

    if out is None:
        out = run / "export" / (target or str(destination).replace(":", "-"))
        refuse_link(out.parent)
    if place is not None:
        lora = read_lora(run)
        place.check(lora, max(layer.rank for layer in lora.layers))
        target = place.form  # pyright: ignore[reportAssignmentType]
    assert target is not None
    export_folder(run, target, out, base=base, overwrite=overwrite)
    console = new_console()
    console.print(f"{target} adapter written to {out}", soft_wrap=True)
    lines = with_label(serving_lines(out, target)) if place is None else served_together(place, {out.name: out})
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


@app.command()
def resize(
    adapter: FolderArgument,
    rank: Annotated[int | None, typer.Option(metavar="R", help="Of every layer, or all that it has.")] = None,
    energy: Annotated[
        float | None, typer.Option(metavar="PART", help="Each layer keeps this part of its squared singular values.")
    ] = None,
    mb: Annotated[
        float | None, typer.Option(metavar="MB", help="The highest rank with which it takes no more.")
    ] = None,
    destination: ForPlace = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: ADAPTER/resized.")] = None,
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
) -> None:
    """Cut an adapter by its singular values, without rows and in seconds: nothing is proved of it."""
    quiet_libraries()
    from pedyra.fitting.resize import Size, resize_adapter

    place = place_of(destination)
    if place is not None and rank is None and energy is None and mb is None:
        rank = place.rank
    result = resize_adapter(adapter, out or adapter / "resized", Size(rank, energy, mb), place, overwrite=overwrite)
    console = new_console()
    for line in result.lines():
        console.print(line, soft_wrap=True, markup=False)
    write_json_lines(json_file, [*result.rows, result.summary()])


@app.command()
def report(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: report.html of the run.")] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write every figure there, as SVG and PNG.")
    ] = None,
) -> None:
    """Make one self-contained HTML page of a run."""
    from pedyra.app.report.images import save_figures
    from pedyra.app.report.page import build_report

    console = new_console()
    console.print(f"report written to {build_report(run, out)}", soft_wrap=True)
    if figures:
        save_figures(run, figures)
        console.print(f"figures written to {figures}", soft_wrap=True)


@app.command()
def fit(
    adapters: Annotated[
        list[Path],
        typer.Argument(
            metavar="ADAPTER...",
            help="Run folder, or any PEFT LoRA folder; with --for several, which one server will hold.",
            show_default=False,
            exists=True,
            file_okay=False,
        ),
    ],
    tolerance: Annotated[list[str] | None, field_option("tolerance", "PART", SEVERAL)] = None,
    changed: Annotated[list[str] | None, field_option("changed", "SHARE", SEVERAL)] = None,
    rank: Annotated[int | None, field_option("rank", "R")] = None,
    rows: Annotated[int | None, field_option("rows")] = None,
    curve: Annotated[bool, field_option("curve")] = False,
    data: Data = None,
    run: Run = None,
    max_length: MaxLength = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    destination: ForPlace = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: ADAPTER/fit.")] = None,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
) -> None:
    """Cut a trained adapter to the smallest that does the job, and prove it on rows of its own.

    With 95 % confidence no more of the answers change than --changed says, or no more of the accuracy, or of what
    fine-tuning won, is given up than --tolerance says. Rows may be text alone. Where several are asked, one calibration
    answers all, and the adapter of the first one is written: of --tolerance, if both are given.
    """
    began = time.perf_counter()
    if len(adapters) > 1 and (destination is None or out is not None or len({*map(Path.absolute, adapters)}) == 1):
        raise UserError(
            "several adapters are fitted for one server, each into its own folder; give --for, and no --out"
        )
    limits = [*({"tolerance": each} for each in tolerance or ()), *({"changed": each} for each in changed or ())]
    request, *others = [FitRequest(**limit, rank=rank, rows=rows, curve=curve) for limit in limits or [{}]]
    source = Source(data=data, run=run, max_length=max_length, dtype=dtype, quantization=quantization)
    place = place_of(destination)
    quiet_libraries()
    from pedyra.app.runs.fit import FitOptions, fit_folders

    console = new_console()
    options = FitOptions(
        request=request,
        others=others,
        source=source,
        place=place,
        overwrite=overwrite,
        began=began,
        progress=console.is_terminal,
    )
    outs = {adapter: out or adapter / "fit" for adapter in adapters}
    lines = []
    for result in fit_folders(outs, options, partial(console.print, soft_wrap=True, markup=False)):
        cost = {"seconds": result.seconds, "steps": result.steps}
        lines += [{**result.row(), **cost}, *result.curve_rows()]
    write_json_lines(json_file, lines)


@app.command()
def prove(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A", help="Run folder, adapter folder, merged model, or the word base.", show_default=False
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="Another of these.", show_default=False)],
    data: Data = None,
    run: Run = None,
    max_length: MaxLength = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    margin: Annotated[
        str | None,
        typer.Option(
            metavar="M",
            help="How much worse B may be: 1% of what A won, 0.5pt of the accuracy, '0.01 loss', or of --samples '0.01 "
            "METRIC'. Default: 1pt for a classifier and for samples, 1% for others.",
        ),
    ] = None,
    changed: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="This share of the answers (classes of rows, next tokens) may be others than A's: it needs no labels. "
            "Default for rows without: 2%.",
        ),
    ] = None,
    samples: Annotated[
        bool,
        typer.Option("--samples", help="A and B are samples_*.jsonl of lm-evaluation-harness; no model is loaded."),
    ] = False,
    metric: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of --samples: the metric, where there are several.")
    ] = None,
    filter_name: Annotated[
        str | None, typer.Option("--filter", metavar="NAME", help="Of --samples: the filter, where there are several.")
    ] = None,
    rows: Annotated[int | None, typer.Option(metavar="N", min=8, help="At most so many rows. Default: all.")] = None,
    base_b: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another base of B: a folder, or a name on the Hub.")
    ] = None,
    quantization_b: Annotated[
        Literal["none", "nf4", "int8"] | None, typer.Option(help="Another quantization of B's base.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
) -> None:
    """Prove on rows that B is no worse than A, or that no more of its answers are others than --changed says, with 95 %
    confidence. Exit code 0: no worse; 1: worse; 3: these rows cannot tell."""
    from pedyra.fitting.prove import NO_WORSE, WORSE, Margin

    source = Source(data=data, run=run, max_length=max_length, dtype=dtype, quantization=quantization)
    of_b = {"name": base_b, "quantization": quantization_b}
    other = {key: value for key, value in of_b.items() if value is not None}
    console = new_console()
    quiet_libraries()
    if samples:
        from pedyra.app.runs.samples import prove_samples

        if other or changed or rows is not None or source != Source():
            raise UserError(
                "--samples loads no model and takes all documents; give beside it --margin, --metric, --filter"
            )
        proof = prove_samples(Path(a), Path(b), margin, metric, filter_name)
    else:
        if metric or filter_name:
            raise UserError("--metric and --filter say what of --samples is compared; give --samples")
        limit = Margin.of_request(margin, changed)
        from pedyra.app.runs.prove import prove_paths

        proof = prove_paths(a, b, limit, source, other, rows=rows, progress=console.is_terminal)
    console.print(str(proof), soft_wrap=True, markup=False)
    write_json_lines(json_file, [proof.row()])
    raise typer.Exit({NO_WORSE: 0, WORSE: 1}.get(proof.verdict, 3))


def main(arguments: list[str] | None = None, commands: typer.Typer = app, name: str = "pedyra") -> None:
    """Run the command line, and turn a user's mistake into one line on stderr and exit code 2."""
    try:
        commands(args=arguments, prog_name=name)
    except Exception as error:
        if not _is_users(error):
            raise
        new_console(stderr=True).print(f"[red]Error:[/red] {_one_line(error)}", soft_wrap=True, markup=True)
        sys.exit(2)


def _is_users(error: Exception) -> bool:
    """Tell whether the message alone tells the user what to repair; anything else is our mistake."""
    if isinstance(error, ImportError):
        return "pip install" in str(error)  # an optional package; the message has the line that installs it
    if isinstance(error, OSError) and error.filename is not None:
        return True  # of a file that is named
    return isinstance(error, UserError) or is_disk_full(error)


def _one_line(error: Exception) -> str:
    from rich.markup import escape

    message = str(error)
    if isinstance(error, OSError) and error.strerror:  # without "[Errno 28]"
        message = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    message = " ".join(message.split())
    if is_disk_full(error):
        message = f"the disk is full ({message}); free space, and give the command again; a training takes --resume"
    return escape(message)

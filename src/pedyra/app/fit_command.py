"""`pedyra fit ADAPTER`: parses and prints; the work is in runs/fit.py and in the room fitting."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pedyra.app.console import new_console, quiet_libraries, write_json_lines
from pedyra.app.options import JsonFile, TrustRemoteCode
from pedyra.app.recipe_sections import part


def fit(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Run folder, or any PEFT LoRA folder.", show_default=False)
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="ROWS", help="Rows (.jsonl, .csv, ...): text and label, prompt and completion, or messages."
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="The run that says model and data, where ADAPTER is none.")
    ] = None,
    tolerance: Annotated[
        str, typer.Option(metavar="PART", help="Part of what fine-tuning won that may be given up, 1% or 0.01.")
    ] = "1%",
    parameters: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Take at most N parameters, whatever the loss does.")
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option("--max-rank", metavar="R", help="No layer keeps more: vLLM pads to the largest.")
    ] = None,
    same_rank: Annotated[bool, typer.Option("--same-rank", help="Every layer keeps the same rank.")] = False,
    multiple_of: Annotated[int, typer.Option("--multiple-of", metavar="M", help="Ranks are multiples of M.")] = 1,
    drop_types: Annotated[
        str,
        typer.Option("--drop-types", metavar="TYPE,...", help="Module types to empty, e.g. q_proj,k_proj."),
    ] = "",
    recover: Annotated[
        int, typer.Option(metavar="STEPS", help="Steps after a cut, towards what the whole says; also tries smaller.")
    ] = 0,
    rows: Annotated[int, typer.Option(min=64, help="Rows at most to calibrate and to prove; half to choose.")] = 1024,
    max_length: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Of --data: cut rows to N tokens; default: as the base can.")
    ] = None,
    curve: Annotated[bool, typer.Option("--curve", help="Measure the whole curve, not only what is needed.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: ADAPTER/fit.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier fit in DIR.")] = False,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the curve there (.svg, .png); RUN's report has it too.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
) -> None:
    """Cut a trained adapter to the smallest that does the job, and prove it on rows of its own."""
    if not adapter.is_dir():
        raise ValueError(f"{adapter} is no folder; give a run folder, or an adapter folder as PEFT saves it")
    quiet_libraries()
    from pedyra.app.report.figures import increase_curve
    from pedyra.app.report.images import check_format, save_image
    from pedyra.app.runs.fit import Source, fit_folder, truncate_folder
    from pedyra.fitting.fit import Wanted

    if figure is not None:
        check_format(figure)
    try:
        share = float(part(tolerance))
    except ValueError:
        raise ValueError(f"--tolerance is {tolerance!r}; give a part such as 1% or 0.01") from None
    wanted = Wanted(
        tolerance=share, parameters=parameters, max_rank=max_rank, same_rank=same_rank,
        multiple_of=multiple_of, drop_types=[name for name in drop_types.split(",") if name],
        recover=recover, rows=rows, curve=curve,
    )  # fmt: skip
    source = Source(data=data, run=run, max_length=max_length)
    console, out = new_console(), out or adapter / "fit"
    if data is None and run is None and not (adapter / "recipe.yaml").is_file():
        ranks = truncate_folder(adapter, wanted, out, overwrite)
        console.print(
            f"warning: without rows nothing was measured; cut by singular values alone, to {sum(ranks.values())} "
            f"directions\nadapter     {out}",
            soft_wrap=True,
        )
        rows_of_it = [{"kept": sum(ranks.values()), "ranks": ranks, "measured_increase": None}]
    else:
        found = fit_folder(adapter, wanted, out, source, overwrite=overwrite, shown=console.is_terminal)
        console.print(str(found), soft_wrap=True)
        console.print(f"adapter     {out}", soft_wrap=True)
        rows_of_it = [found.row(), *found.curve_rows()]
        if figure is not None:
            save_image({**increase_curve(found.curve_rows()), "width": 520, "height": 240}, figure)
            console.print(f"figure      {figure}", soft_wrap=True)
    if json_file:
        write_json_lines(json_file, rows_of_it)

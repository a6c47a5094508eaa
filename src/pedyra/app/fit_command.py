"""`pedyra fit ADAPTER`: parses and prints; the work is in runs/fit.py and fit/."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pedyra.app.console import new_console, print_table, quiet_libraries, write_json_lines
from pedyra.app.options import JsonFile, TrustRemoteCode

if TYPE_CHECKING:
    from pedyra.app.runs.fit import Wanted
    from pedyra.fitting.fit import Fit


def fit(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Run folder, or any PEFT LoRA folder.", show_default=False)
    ],
    data: Annotated[
        Path | None,
        typer.Option(metavar="ROWS", help="Rows (.jsonl, .csv, ...): text and label, or prompt and completion."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="The run that says model and data, where ADAPTER is none.")
    ] = None,
    tolerance: Annotated[
        str, typer.Option(metavar="PART", help="Part of what fine-tuning won that may be given up, 1% or 0.01.")
    ] = "1%",
    parameters: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Take at most so many parameters, whatever it costs.")
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
    rows: Annotated[int, typer.Option(min=64, help="Rows at most to calibrate and to choose; half to prove.")] = 1024,
    max_length: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Of --data: cut rows to N tokens; default: as the base can.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: ADAPTER/fit.")] = None,
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
    from pedyra.app.report.fit_figure import cost_curve
    from pedyra.app.report.images import check_format, save_image
    from pedyra.app.runs.fit import Wanted, fit_folder, truncate_folder

    if figure is not None:
        check_format(figure)
    wanted = Wanted(
        tolerance=_part(tolerance), parameters=parameters, max_rank=max_rank, same_rank=same_rank,
        multiple_of=multiple_of, drop_types=[name for name in drop_types.split(",") if name],
        recover=recover,
    )  # fmt: skip
    console, out = new_console(), out or adapter / "fit"
    if data is None and run is None and not (adapter / "recipe.yaml").is_file():
        ranks = truncate_folder(adapter, wanted, out)
        console.print(
            f"warning: without rows nothing was measured; cut by singular values alone, to {sum(ranks.values())} "
            f"directions\nadapter     {out}",
            soft_wrap=True,
        )
        rows_of_it = [{"kept": sum(ranks.values()), "ranks": ranks, "measured_cost": None}]
    else:
        with console.status("") as status:
            found = fit_folder(
                adapter, wanted, out, data=data, run=run, rows=rows, max_length=max_length, progress=status.update
            )
        _print(console, found, wanted)
        console.print(f"adapter     {out}", soft_wrap=True)
        rows_of_it = [found.row(), *found.curve_rows()]
        if figure is not None:
            save_image({**cost_curve(found.curve_rows()), "width": 520, "height": 240}, figure)
            console.print(f"figure      {figure}", soft_wrap=True)
    if json_file:
        write_json_lines(json_file, rows_of_it)


def _part(text: str) -> float:
    """1% or 0.01 as a number; ValueError for anything else."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(f"--tolerance is {text!r}; give a part such as 1% or 0.01") from None


def _cost(cost: float | None, error: float | None) -> str:
    return "" if cost is None else f"{cost:+.4f} ± {error or 0.0:.4f}"


def _print(console: Console, found: Fit, wanted: Wanted) -> None:
    rows = found.curve_rows()
    tried = any(row["recovered_cost"] is not None for row in rows)
    cells = [
        [
            "->" if row["chosen"] else "",
            f"{row['parameters']:,}",
            f"{row['share']:.1%}",
            str(row["kept"]),
            f"{row['predicted_cost']:+.4f}",
            _cost(row["measured_cost"], row["standard_error"]),
            *([_cost(row["recovered_cost"], row["recovered_standard_error"])] if tried else []),
        ]
        for row in rows
    ]
    head = ["", "parameters", "share", "directions", "predicted cost", "measured cost"]
    print_table(console, head + (["recovered"] if tried else []), cells)
    row, limit = found.row(), found.tolerance
    won = f"{limit.won:.4f} ± {limit.won_standard_error:.4f}"
    console.print(found.words, soft_wrap=True)
    console.print(f"won         {won} of the loss; {limit.part:.1%} of it is {limit.loss:.4f}", soft_wrap=True)
    if found.proof is None:
        console.print("kept        all: no smaller size is within tolerance on these rows", soft_wrap=True)
        return
    if found.chosen.recovered is not None:
        change = f"cost {found.chosen.measured:+.4f} -> {found.chosen.recovered:+.4f} in {found.recover_steps} steps"
        kept = "" if found.chosen.gains_by_recovery else "; no gain, so the cut stays as it was"
        console.print(f"recovered   {change}, on the rows of the choice{kept}", soft_wrap=True)
    error = 1.96 * (found.proof_standard_error or 0.0)
    interval = f"[{found.proof - error:+.4f}, {found.proof + error:+.4f}]"
    size = f"{row['parameters']:,} parameters ({row['share']:.1%})"
    console.print(f"kept        {row['kept']} of {row['of']} directions, {size}", soft_wrap=True)
    console.print(f"proof       costs {found.proof:+.4f} {interval} on rows of its own", soft_wrap=True)
    if wanted.parameters is not None and found.proof > limit.loss:
        console.print("            more than the tolerance: the size was asked for", soft_wrap=True)

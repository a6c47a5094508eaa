"""`pedyra fit ADAPTER`: parses and prints; the work is in runs/fit.py and in the room fitting."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pedyra.app.console import format_bytes, new_console, quiet_libraries, write_json_lines
from pedyra.app.options import JsonFile, TrustRemoteCode
from pedyra.app.recipe_sections import part

if TYPE_CHECKING:
    from pedyra.app.runs.fit import Source
    from pedyra.fitting.fit import Wanted

AUTO: Literal["auto"] = "auto"


def fit(
    adapters: Annotated[
        list[Path],
        typer.Argument(metavar="ADAPTER...", help="Run folder, or any PEFT LoRA folder.", show_default=False),
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
        str | None,
        typer.Option(
            "--max-rank",
            metavar="R",
            help="No layer keeps more: vLLM pads to the largest. auto: the least of vLLM's for all ADAPTERs together.",
        ),
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
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Default: ADAPTER/fit; of several: DIR/NAME each.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier fit in DIR.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
) -> None:
    """Cut a trained adapter to the smallest that does the job, and prove it on rows of its own."""
    for adapter in adapters:
        if not adapter.is_dir():
            raise ValueError(f"{adapter} is no folder; give a run folder, or an adapter folder as PEFT saves it")
    rank = _rank(max_rank)
    if len(adapters) > 1 and rank != AUTO:
        raise ValueError(f"{len(adapters)} adapters are fitted together with --max-rank auto; else give one")
    quiet_libraries()
    from pedyra.app.runs.fit import Source, fit_folder
    from pedyra.fitting.fit import Wanted

    try:
        share = float(part(tolerance))
    except ValueError:
        raise ValueError(f"--tolerance is {tolerance!r}; give a part such as 1% or 0.01") from None
    wanted = Wanted(
        tolerance=share, parameters=parameters, max_rank=None if rank == AUTO else rank,
        same_rank=same_rank, multiple_of=multiple_of, drop_types=[name for name in drop_types.split(",") if name],
        recover=recover, rows=rows, curve=curve,
    )  # fmt: skip
    source = Source(data=data, run=run, max_length=max_length)
    if rank == AUTO:
        rows_of_it = _for_server(adapters, wanted, source, out, overwrite)
        if json_file:
            write_json_lines(json_file, rows_of_it)
        return
    (adapter,) = adapters
    console, out = new_console(), out or adapter / "fit"
    found = fit_folder(adapter, wanted, out, source, overwrite=overwrite, shown=console.is_terminal)
    console.print(str(found), soft_wrap=True)
    console.print(f"adapter     {out}", soft_wrap=True)
    if json_file:
        write_json_lines(json_file, [found.row(), *found.curve_rows()])


def _for_server(
    adapters: list[Path], wanted: Wanted, source: Source, out: Path | None, overwrite: bool
) -> list[dict[str, Any]]:
    """--max-rank auto: one padded rank for all of them; the rows of --json."""
    from pedyra.app.runs.serve import fit_for_server

    if wanted.parameters is not None:
        raise ValueError("--parameters goes with one size of one adapter, not with --max-rank auto")
    adapters = list(dict.fromkeys(adapters))
    names = [adapter.resolve().name for adapter in adapters]
    if out is not None and len(set(names)) < len(names):
        raise ValueError(f"with --out the folders need names of their own, but they are {', '.join(names)}")
    console = new_console()
    outs = {each: each / "fit" if out is None else out / name for each, name in zip(adapters, names, strict=True)}
    served = fit_for_server(
        outs, wanted, source, overwrite=overwrite, shown=console.is_terminal,
        told=lambda line: console.print(line, soft_wrap=True, markup=False),
    )  # fmt: skip
    for adapter, found in zip(adapters, served.found.values(), strict=True):
        row = found.row()
        console.print(f"{adapter}: {row['parameters']:,} parameters ({row['share']:.1%}), in {outs[adapter]}")
    before = "more than vLLM takes" if served.rank_before is None else str(served.rank_before)
    console.print(f"max rank    {served.rank}, where they needed {before}")
    if served.saved is not None:
        console.print(f"saved       {format_bytes(served.saved)} of a server that holds {len(adapters)} at once")
    told = served.line if served.refused is None else f"not in vLLM: {served.refused}"
    console.print(f"serve       {told}", soft_wrap=True, markup=False)
    result = {"max_rank": served.rank, "rank_before": served.rank_before, "saved_bytes": served.saved}
    return [result, *({"adapter": str(each), **found.row()} for each, found in served.found.items())]


def _rank(text: str | None) -> int | Literal["auto"] | None:
    """A rank of at least 1, or auto; ValueError for anything else."""
    if text is None or text == AUTO:
        return text
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"--max-rank is {text!r}; give a rank of at least 1, or auto")
    return int(text)

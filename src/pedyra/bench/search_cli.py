"""`pedyra search RECIPE`: parses and prints; the work is in rank_search.py."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from pedyra.console import new_console, print_rank_map, quiet_libraries, write_json_lines
from pedyra.options import JsonFile


def search(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Change recipe keys, e.g. lora.r=4 seed=1.", show_default=False),
    ] = None,
    part: Annotated[float, typer.Option(help="Part of the recipe's steps that the search takes.")] = 0.1,
    widen: Annotated[int, typer.Option(help="Rank of the search run, as a multiple of lora.r.")] = 4,
    min_rank: Annotated[int, typer.Option("--min-rank", help="No layer gets less.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: ranks.json in the search run's folder.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier search.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Find ranks for plain LoRA by a short and wide run, at the parameters of lora.r everywhere."""
    from pedyra.recipe import load_recipe

    checked = load_recipe(recipe, overrides or [])
    quiet_libraries()
    from pedyra.bench.rank_search import search_ranks, write_lora_arguments

    console = new_console()
    try:
        found = search_ranks(checked, part=part, widen=widen, min_rank=min_rank, overwrite=overwrite, console=console)
    except KeyboardInterrupt:
        console.print("Stopped, so there are no ranks; start the search anew with --overwrite.")
        raise typer.Exit(130) from None
    path = out or Path(f"{checked.output_dir}-search") / "ranks.json"
    write_lora_arguments(found, path)
    *layers, _ = found.rows()
    print_rank_map(console, layers)
    console.print(
        f"{found.parameters:,} parameters; rank {found.uniform} everywhere has {found.budget:,}", soft_wrap=True
    )
    own = ("method", "method_settings", "rank", "lora.ranks", "output_dir")  # what the search changed, or LoRA has not
    kept = [
        given for given in overrides or [] if not given.startswith(tuple(f"{key}{end}" for key in own for end in "=."))
    ]
    again = [*kept, "method=lora", "method_settings={}", f"lora.ranks={path}", f"output_dir={checked.output_dir}-found"]
    console.print(f"train it    pedyra train {shlex.join([str(recipe), *again])}", soft_wrap=True, markup=False)
    console.print(f"with PEFT   LoraConfig(**json.load(open({str(path)!r})))", soft_wrap=True, markup=False)
    if json_file:
        write_json_lines(json_file, found.rows())

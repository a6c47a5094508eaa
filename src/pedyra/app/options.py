"""Several commands share these arguments and options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import TypeAdapter

from pedyra.app.runs.source import Source
from pedyra.fitting.request import FitRequest

if TYPE_CHECKING:
    from pedyra.export.destinations import Destination


def _check_parent(path: Path | None) -> Path | None:
    """Refuse a file that cannot be written before a long run, not after it."""
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"the folder {path.parent} does not exist")
    return path


def json_option(help: str) -> Any:
    return typer.Option("--json", metavar="FILE", help=help, callback=_check_parent, dir_okay=False, show_default=False)


def _trust(wanted: bool) -> bool:
    if wanted:
        from pedyra.export.hub import trust_remote_code

        trust_remote_code()
    return wanted


TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that a model's repository carries.", callback=_trust)
]
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="Run folder.", exists=True, file_okay=False, show_default=False)
]
FolderArgument = Annotated[
    Path,
    typer.Argument(
        metavar="FOLDER", help="Run folder, or any LoRA folder.", exists=True, file_okay=False, show_default=False
    ),
]
JsonFile = Annotated[Path | None, json_option("Also write JSON lines there.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Change keys of the file, e.g. seed=1 lora.r=4.", show_default=False),
]

ForPlace = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="PLACE[:R]",
        help="The place that will serve it (vllm, llama.cpp, ...) says its ranks and its form; vllm:16 is for that "
        "rank.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier one in DIR.")]


def place_of(name: str | None) -> Destination | None:
    from pedyra.export.destinations import destination

    return None if name is None else destination(name)


# The docstrings of the fields of both records, which recipes show too.
_HELP: dict[str, str] = {
    name: " ".join(field["description"].split())
    for record in (FitRequest, Source)
    for name, field in TypeAdapter(record).json_schema()["properties"].items()
}


def field_option(name: str, metavar: str | None = None, more: str = "") -> Any:
    return typer.Option(f"--{name.replace('_', '-')}", help=f"{_HELP[name]}{more}", metavar=metavar)


Data = Annotated[Path | None, field_option("data", "ROWS")]
Run = Annotated[Path | None, field_option("run", "RUN")]
MaxLength = Annotated[int | None, field_option("max_length", "N")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"] | None, field_option("dtype")]
Quantization = Annotated[Literal["nf4", "int8"] | None, field_option("quantization")]

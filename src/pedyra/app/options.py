"""Several commands share these arguments and options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from pydantic import TypeAdapter

from pedyra.app.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from pedyra.export.destinations import Destination


def _checked(path: Path | None) -> Path | None:
    """Refuse a file that cannot be written before a long run, not after it."""
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"the folder {path.parent} does not exist")
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; give a file")
    return path


def _run_folder(path: Path) -> Path:
    RunFolder(path).check_holds_run()
    return path


def json_option(help: str) -> Any:
    """Make --json FILE, which is checked before anything is done."""
    return typer.Option("--json", metavar="FILE", help=help, callback=_checked, show_default=False)


def _trust(wanted: bool) -> bool:
    if wanted:
        from pedyra.app.hub import trust_remote_code

        trust_remote_code()
    return wanted


TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that a model's repository carries.", callback=_trust),
]
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="Run folder.", callback=_run_folder, show_default=False)
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
    """Find the place of `--for`, if there is one."""
    from pedyra.export.destinations import destination

    return None if name is None else destination(name)


METAVARS = {"tolerance": "PART", "changed": "SHARE", "rank": "R", "data": "ROWS", "run": "RUN", "max_length": "N"}
"""The command line calls the values of these so."""


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Make an option of each field of the parameters that are records (`FitRequest`, `Source`), but for those that the
    command has itself."""
    signature = inspect.signature(command, eval_str=True)
    own = signature.parameters.keys()
    records: dict[str, Any] = {
        name: each.annotation for name, each in signature.parameters.items() if is_dataclass(each.annotation)
    }
    parameters: list[inspect.Parameter] = []
    for name, each in signature.parameters.items():
        if name in records:
            parameters += [each for each in _options(records[name]) if each.name not in own]
        else:
            parameters.append(each.replace(kind=each.KEYWORD_ONLY))

    @wraps(command)
    def wrapped(**given: Any) -> None:
        made = {
            name: record(**{each.name: given.pop(each.name) for each in fields(record) if each.name not in own})
            for name, record in records.items()
        }
        command(**made, **given)

    vars(wrapped)["__signature__"] = signature.replace(parameters=parameters)
    wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
    return wrapped


def _options(record: Any) -> list[inspect.Parameter]:
    """Make options of a record."""
    kinds, options = get_type_hints(record), []
    for each in fields(record):
        kind, default = kinds[each.name], each.default
        annotation = Annotated[kind, option_of(record, each.name, shown=default not in (None, False))]
        options.append(
            inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return options


def option_of(record: Any, name: str, more: str = "", *, shown: bool = False) -> Any:
    """Make the option of a field, whose docstring is its help.

    Args:
        more: what the help says beside it.
        shown: the help shows the default.
    """
    words = TypeAdapter(record).json_schema()["properties"][name]["description"]
    help = " ".join(f"{words} {more}".split())
    return typer.Option(f"--{name.replace('_', '-')}", help=help, show_default=shown, metavar=METAVARS.get(name))

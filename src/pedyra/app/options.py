"""Several commands share these arguments and options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
from pydantic import TypeAdapter

from pedyra.app.runs.run_folder import RunFolder
from pedyra.errors import UserError
from pedyra.fitting.wanted import Wanted


def _checked(path: Path | None) -> Path | None:
    """Refuse a file that cannot be written before a long run, not after it."""
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"the folder {path.parent} does not exist")
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; give a file")
    return path


def _folder(path: Path) -> Path:
    """Refuse what is no folder before the seconds that torch takes to load."""
    if not path.is_dir():
        found = "is a file" if path.is_file() else "does not exist"
        raise UserError(f"{path} {found}; give a run folder or an adapter folder")
    return path


def _run_folder(path: Path) -> Path:
    RunFolder(path).check_holds_run()
    return path


def json_option(help: str) -> Any:
    """Make --json FILE, which is checked before anything is done."""
    return typer.Option("--json", metavar="FILE", help=help, callback=_checked, show_default=False)


def _trust(wanted: bool) -> bool:
    if wanted:
        from pedyra.app.export.hub import trust_remote_code

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
    typer.Argument(metavar="FOLDER", help="Run folder, or any LoRA folder.", callback=_folder, show_default=False),
]
JsonFile = Annotated[Path | None, json_option("Also write JSON lines there.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Change keys of the file, e.g. seed=1 lora.r=4.", show_default=False),
]


@dataclass(frozen=True)
class Given:
    """What `fit` and `prove` take of rows and base, where the folder of an adapter does not say it."""

    data: Annotated[
        Path | None,
        typer.Option(
            metavar="ROWS", help="Rows (.jsonl, .csv, ...): text and label, prompt and completion, or messages."
        ),
    ] = None
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Take model and data from this run, where none that is given is one."),
    ] = None
    max_length: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="Cut the rows of --data to N tokens. Default: what the base can take."),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Type of the base's weights, where no run says it. auto: as they were saved. Default: float32."
        ),
    ] = None
    quantization: Annotated[
        Literal["nf4", "int8"] | None,
        typer.Option(help="Quantization of the base, where no run says it. Give that of the training (QLoRA: nf4)."),
    ] = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.data is None:
            raise UserError(
                "--max-length cuts the rows of --data, and there is no --data; leave it out: a run has a "
                "data.max_length"
            )


METAVARS = {"tolerance": "PART", "rank": "R"}
"""How the command line calls the values of what a fit is asked; numbers where nothing stands here."""


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters that are records (`Wanted`, `Given`) are an option of the command line a field."""
    signature = inspect.signature(command, eval_str=True)
    records: dict[str, Any] = {
        name: each.annotation for name, each in signature.parameters.items() if is_dataclass(each.annotation)
    }
    parameters: list[inspect.Parameter] = []
    for name, each in signature.parameters.items():
        if name not in records:
            parameters.append(each.replace(kind=each.KEYWORD_ONLY))
        elif records[name] is Wanted:
            parameters += _of_wanted()
        else:
            hints = get_type_hints(records[name], include_extras=True)
            parameters += [
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
                )
                for field in fields(records[name])
            ]

    @wraps(command)
    def wrapped(**given: Any) -> None:
        made = {
            name: record(**{field.name: given.pop(field.name) for field in fields(record)})
            for name, record in records.items()
        }
        command(**made, **given)

    vars(wrapped)["__signature__"] = signature.replace(parameters=parameters)
    wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
    return wrapped


def _of_wanted() -> list[inspect.Parameter]:
    """What a fit is asked, as options: their help is that of the fields of `Wanted`."""
    told = TypeAdapter(Wanted).json_schema()["properties"]
    options = []
    for each in fields(Wanted):
        switch, number = isinstance(each.default, bool), isinstance(each.default, int) or each.default is None
        kind: Any = bool if switch else int if number else str
        name = f"--{each.name.replace('_', '-')}"
        help = " ".join(told[each.name]["description"].split())
        option = typer.Option(name, help=help, show_default=False, metavar=None if switch else METAVARS.get(each.name))
        default = each.default if switch or number else str(each.default or "")
        kind = kind | None if each.default is None else kind
        options.append(
            inspect.Parameter(
                each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
            )
        )
    return options

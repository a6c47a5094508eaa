"""Several commands share these arguments and options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pedyra.app.runs.run_folder import RunFolder


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
        raise ValueError(f"{path} {found}; give a run folder or an adapter folder")
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

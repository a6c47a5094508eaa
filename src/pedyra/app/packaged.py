"""Files and modules of optional packages are found here, and models are prepared from them once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from filelock import FileLock

from pedyra.errors import UserError
from pedyra.lora.files import write_folder


def packaged_file(relative: str, *, install: str) -> Path:
    """Find a file of an installed package, `relative` to a folder of sys.path, without importing the package, because
    that may need many others."""
    for folder in sys.path:
        path = Path(folder or ".") / relative
        if path.exists():
            return path
    raise ImportError(f"{relative} is carried by a package that is not installed; run: {install}")


def import_extra(module: str, what: str, extra: str) -> Any:
    """Import the module of an optional package, or say that `what` needs it, and the line that installs it."""
    try:
        return import_module(module)
    except ImportError:
        raise ImportError(f'{what}; run in a checkout: pip install ".[{extra}]"') from None


def cached_folder(name: str, prepare: Callable[[Path], None]) -> Path:
    """Return the cached folder `name`; when absent, `prepare` fills it, and it appears complete or not at all."""
    folder = Path(os.environ.get("PEDYRA_CACHE") or Path.home() / ".cache" / "pedyra").expanduser() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache {folder.parent} cannot be written ({error}); set PEDYRA_CACHE to a folder that can"
        ) from error
    with FileLock(folder.with_name(f".{name}.lock")):  # two runs may ask for it at once
        if not folder.is_dir():
            write_folder(folder, lambda part: (part.mkdir(), prepare(part)))
    return folder

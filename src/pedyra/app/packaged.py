"""Files that PyPI packages carry, found without importing those packages, and what is prepared from them once."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def packaged_file(relative: str, *, install: str) -> Path:
    """Path of a file in an installed package, `relative` to a folder of sys.path.

    The package is not imported: some that carry a useful file need many others to be imported.
    Raises ImportError with the line that installs it.
    """
    for folder in sys.path:
        path = Path(folder or ".") / relative
        if path.exists():
            return path
    raise ImportError(f"{relative} is carried by a package that is not installed; run: {install}")


def cache_dir() -> Path:
    """Where prepared models and data are kept: $PEDYRA_CACHE, or ~/.cache/pedyra."""
    return Path(os.environ.get("PEDYRA_CACHE") or Path.home() / ".cache" / "pedyra").expanduser()


def prepared(name: str, prepare: Callable[[Path], None]) -> Path:
    """The cached folder `name`; when absent, `prepare` fills it. It appears complete or not at all."""
    folder = cache_dir() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder.parent))
    try:
        prepare(part)
        try:
            part.rename(folder)
        except OSError:
            # Two runs prepared it at once; the other was first, and its folder is as good.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder

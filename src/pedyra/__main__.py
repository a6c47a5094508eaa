"""The command line, as `pedyra` and as `python -m pedyra`, where the extra pedyra[cli] is installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDED = tuple("altair datasets filelock jinja2 psutil pydantic rich ruamel sklearn typer vl_convert".split())
"""Modules of the extra pedyra[cli]: the callback needs none of them."""


def main() -> None:
    """Run the command line; one line and exit code 2 where a package that it needs is not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(
            f'Error: the command line needs {", ".join(missing)}; run in a checkout: pip install ".[cli]"',
            file=sys.stderr,
        )
        sys.exit(2)
    from pedyra.lab.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()

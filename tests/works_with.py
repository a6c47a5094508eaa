"""What the tests of trainers, optimizers, engines and tools found: rows of works_with.jsonl, made by make works-with.

`note` is called by those tests, and writes where PEDYRA_WORKS_WITH is set; the table in docs/works_with.md is made from
the rows.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parent.parent / "research" / "results" / "works_with.jsonl"
KINDS: dict[str, str | None] = {"trainer": "trl", "optimizer": "bitsandbytes", "engine": "accelerate", "tool": None}
"""Of a row, and the package whose version stands in it beside torch and transformers; of a tool its own."""


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.is_file() else []


def note(kind: str, name: str, package: str | None = None, **found: str) -> None:
    """Put this row in the place of an older one of the same name.

    Args:
        package: of a tool, where it was run.
        found: column -> "works", "refused: why", or what else there is to say.
    """
    if not os.environ.get("PEDYRA_WORKS_WITH"):
        return
    packages = ("torch", "transformers", KINDS[kind] or package)
    versions = {each: importlib.metadata.version(each) for each in packages if each is not None}
    row = {"kind": kind, "name": name, **found, "versions": versions}
    others = [each for each in rows() if (each["kind"], each["name"]) != (kind, name)]
    order = [*KINDS]
    written = sorted([*others, row], key=lambda each: (order.index(each["kind"]), each["name"]))
    ROWS.write_text("".join(json.dumps(each) + "\n" for each in written))


def refused(error: BaseException) -> str:
    """What a refusal says, without its repair."""
    return f"refused: {str(error).split(';')[0]}"

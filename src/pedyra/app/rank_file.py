"""`lora.ranks`: a rank for each layer, in the recipe or in a file such as `pedyra fit` writes. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pedyra.app.yaml_file import parse_yaml


def read_ranks(given: Any) -> dict[str, int] | None:
    """Layer name -> rank, from such a mapping or the path of a YAML or JSON file with one; None stays None.

    The `pedyra_fit.json` beside an adapter that `pedyra fit` has cut gives its `ranks`.

    Raises:
        ValueError: no such file, no mapping in it, a rank that is no integer of at least 0, or none above 0.
    """
    if given is None:
        return None
    where = "lora.ranks"
    if isinstance(given, str):
        path = Path(given)
        if not path.is_file():
            raise ValueError(
                f"lora.ranks: there is no file {given!r}; give a YAML or JSON file of ranks, or a fit's pedyra_fit.json"
            )
        where = f"lora.ranks, file {given!r}"
        given = parse_yaml(path.read_bytes(), where)
        if isinstance(given, dict) and isinstance(given.get("ranks"), dict):
            given = given["ranks"]
    if not isinstance(given, dict):
        raise ValueError(f"{where} is no mapping of layer names to ranks, e.g. {{query: 4, value: 8}}")
    for name, rank in given.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ValueError(f"{where}: the rank of {name!r} is {rank!r}; it is an integer of at least 0")
    if not any(given.values()):
        raise ValueError(f"{where} gives no layer a rank above 0; name at least one, e.g. {{query: 4}}")
    return {str(name): rank for name, rank in given.items()}

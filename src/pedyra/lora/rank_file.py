"""`lora.ranks`: a rank for each layer, in the recipe or in a file such as `pedyra search` writes. Loads no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pedyra.yaml_file import parse_yaml


def read_ranks(given: Any) -> dict[str, int] | None:
    """Layer name -> rank, from such a mapping or the path of a YAML or JSON file with one; None stays None.

    A file with the arguments of a LoraConfig gives its `rank_pattern`, whose keys may be anchored (^name).

    Raises:
        ValueError: no such file, no mapping in it, a rank that is no integer of at least 0, or none above 0.
    """
    if given is None:
        return None
    where = "lora.ranks"
    if isinstance(given, str):
        path = Path(given)
        if not path.is_file():
            raise ValueError(f"lora.ranks: there is no file {given!r}; `pedyra search RECIPE` writes one")
        where = f"lora.ranks, file {given!r}"
        given = parse_yaml(path.read_text(encoding="utf-8"), where)
        if isinstance(given, dict) and isinstance(given.get("rank_pattern"), dict):
            pattern = given["rank_pattern"].items()  # of which some keys are anchored, and their dots escaped
            given = {re.sub(r"\\(.)", r"\1", str(key).removeprefix("^")): rank for key, rank in pattern}
    if not isinstance(given, dict):
        raise ValueError(f"{where} is no mapping of layer names to ranks, e.g. {{query: 4, value: 8}}")
    for name, rank in given.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ValueError(f"{where}: the rank of {name!r} is {rank!r}; it is an integer of at least 0")
    if not any(given.values()):
        raise ValueError(f"{where} gives no layer a rank above 0; name at least one, e.g. {{query: 4}}")
    return {str(name): rank for name, rank in given.items()}

"""What the benchmarks know by name. It loads no torch, so that a wrong name is told at once."""

from __future__ import annotations

import re

from pedyra.lora.spelling import did_you_mean
from pedyra.methods.names import NAMES

MINILM = "minilm"


def check_methods(text: str, *more: str) -> None:
    """Raise ValueError unless it begins with a method's name, or is one of `more`; settings are checked later."""
    name = text.partition(":")[0]
    if name not in (*NAMES, *more):
        raise ValueError(f"method {name!r} is unknown; {did_you_mean(name, [*NAMES, *more])}")


def check_model(name: str) -> None:
    """Raise ValueError for no model of the speed benchmarks."""
    if name != MINILM:
        llama_shape(name)


def llama_shape(name: str) -> tuple[int, int]:
    """Width and depth of a random model: "llama-256x8" -> (256, 8). Raises ValueError for another name."""
    match = re.fullmatch(r"llama-(\d+)x(\d+)", name)
    if match is None or int(match[1]) % 32 or not int(match[1]) or not int(match[2]):
        raise ValueError(
            f"model {name!r} is unknown; choose minilm, or llama-WIDTHxDEPTH with a width that is a multiple of 32 and "
            f"a depth of at least 1, e.g. llama-256x8"
        )
    return int(match[1]), int(match[2])

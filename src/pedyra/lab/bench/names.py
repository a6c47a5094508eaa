"""What the benchmarks know by name. It loads no torch, so that a wrong name is told at once."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pedyra.lora.spelling import did_you_mean
from pedyra.methods.names import NAMES

REAL_MODELS = ("minilm", "smollm2")


def check_methods(texts: Sequence[str], *more: str) -> None:
    """Raise ValueError unless each begins with a method's name, or is one of `more`; settings are checked later."""
    for text in texts:
        name = text.partition(":")[0]
        if name not in (*NAMES, *more):
            raise ValueError(f"method {name!r} is unknown; {did_you_mean(name, [*NAMES, *more])}")


def model_shape(name: str) -> tuple[str, int, int]:
    """Kind, width and depth of a random model: "llama-256x8" -> ("llama", 256, 8); of a real one its name, 0 and 0.

    Raises:
        ValueError: no such model.
    """
    if name in REAL_MODELS:
        return name, 0, 0
    match = re.fullmatch(r"(llama|deberta)-(\d+)x(\d+)", name)
    if match is None or int(match[2]) % 32 or not int(match[2]) or not int(match[3]):
        raise ValueError(
            f"model {name!r} is unknown; choose minilm, smollm2, llama-WIDTHxDEPTH or deberta-WIDTHxDEPTH, with a "
            f"width that is a multiple of 32 and a depth of at least 1, e.g. llama-256x8"
        )
    return match[1], int(match[2]), int(match[3])

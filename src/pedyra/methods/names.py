"""The names of all methods stand here without torch, in the order of a table, so that a wrong name is told at once."""

from __future__ import annotations

from pedyra.errors import UserError
from pedyra.lora.spelling import did_you_mean

NAMES = (
    *("lora", "lora+", "pissa", "dora", "qlora", "randlora"),
    *("adalora", "adalora-svd", "increlora", "triadaptlora", "dylora", "rasa", "sora", "autolora"),
    *("prune", "expand", "random", "mask", "pedyra"),
)


def check_method(name: str) -> None:
    """Raise ValueError unless there is a method of this name; the message names the nearest."""
    if name not in NAMES:
        raise UserError(f"method {name!r} is unknown; {did_you_mean(name, NAMES)}")

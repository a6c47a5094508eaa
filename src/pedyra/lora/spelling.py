"""A name is unknown; perhaps one of the known ones was meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: object, known: Iterable[str], *, otherwise: str | None = None, prefix: str = "") -> str:
    """Ask "did you mean 'lora'?" with the nearest known name after `prefix`, for the end of a message; where none is
    near, say `otherwise`, or all that are known."""
    names = {each.lower(): each for each in reversed(list(known))}
    near = get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {prefix + names[near[0]]!r}?"
    return f"known are {', '.join(reversed(names.values()))}" if otherwise is None else otherwise

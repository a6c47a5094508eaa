"""What a layer's name says: where it sits in its model, and how PEFT's patterns name it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache


def layer_place(name: str) -> tuple[str, int]:
    """Module type and depth: encoder.layer.3.attention.self.query -> (attention.self.query, 3).

    The depth is the first number in the name; a module outside of any block keeps its name and stands at depth 0, one
    that is itself the numbered one is of the type of its list: layers.3 -> (layers, 3).
    """
    parts = name.split(".")
    block = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return (name, 0) if block is None else (".".join(parts[block + 1 :]) or ".".join(parts[:block]), int(parts[block]))


def pattern_keys(names: Iterable[str]) -> dict[str, str]:
    """Layer name -> its key in `rank_pattern`, which means this layer alone.

    PEFT takes keys as regular expressions for the end of a name. One that ends another name too is anchored, its dots
    are escaped where they could be other characters ("enc.q" is also "enc_q"), and all of it is where a character means
    something else ("c++.q" is "ccc.q", and not itself).
    """
    names = tuple(names)
    return dict(zip(names, _keys(names), strict=True))


@lru_cache(maxsize=64)
def _keys(names: tuple[str, ...]) -> tuple[str, ...]:
    # Length -> all that stands behind a dot in some name, and the names themselves.
    ends: dict[int, list[str]] = {}
    for name in names:
        for end in _ends(name):
            ends.setdefault(len(end), []).append(end)
    # (length, places of dots) -> an end without the letters at these places -> all ends that look so.
    blurred: dict[tuple[int, ...], dict[str, set[str]]] = {}
    counts = Counter(end for group in ends.values() for end in group)
    keys = []
    for name in names:
        places = tuple(place for place, letter in enumerate(name) if letter == ".")
        alike = blurred.get((len(name), *places))
        if alike is None:
            alike = blurred[(len(name), *places)] = {}
            for end in ends[len(name)]:
                alike.setdefault(_without(end, places), set()).add(end)
        if len(alike[_without(name, places)]) > 1 or not re.fullmatch(r"[\w.-]+", name):
            keys.append("^" + re.escape(name))
        else:
            keys.append("^" + name if counts[name] > 1 else name)
    return tuple(keys)


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _without(text: str, places: tuple[int, ...]) -> str:
    letters = list(text)
    for place in places:
        letters[place] = "."
    return "".join(letters)

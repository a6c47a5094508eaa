"""What a layer's name says: where it sits in its model, and how PEFT's patterns name it alone."""

from __future__ import annotations

import re
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

    PEFT takes keys as regular expressions for the end of a name. One that ends another name too is anchored, and its
    dots are escaped where they could be other characters ("enc.q" is also "enc_q").
    """
    names = tuple(names)
    return dict(zip(names, _keys(names), strict=True))


@lru_cache(maxsize=64)
def _keys(names: tuple[str, ...]) -> tuple[str, ...]:
    keys = []
    for name in names:
        others = [other for other in names if other != name and _matches(name, other)]
        alike = any(len(other) == len(name) or not other.endswith(name) for other in others)
        keys.append(name if not others else "^" + (re.escape(name) if alike else name))
    return tuple(keys)


def _matches(key: str, name: str) -> bool:
    """Whether PEFT takes `key`, an unescaped name, for that of `name`."""
    cut = len(name) - len(key)
    if cut < 0 or (cut > 0 and name[cut - 1] != "."):
        return False
    return all(k in (letter, ".") for k, letter in zip(key, name[cut:], strict=True))

"""What a layer's name says: where it sits in its model, and how PEFT's patterns name it alone."""

from __future__ import annotations

from collections.abc import Iterable


def layer_place(name: str) -> tuple[str, int]:
    """Module type and depth: encoder.layer.3.attention.self.query -> (attention.self.query, 3).

    The depth is the first number in the name; a module outside of any block keeps its name and stands at depth 0, one
    that is itself the numbered one is of the type of its list: layers.3 -> (layers, 3).
    """
    parts = name.split(".")
    block = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return (name, 0) if block is None else (".".join(parts[block + 1 :]) or ".".join(parts[:block]), int(parts[block]))


def pattern_keys(names: Iterable[str]) -> dict[str, str]:
    """Layer name -> its key in `rank_pattern`: PEFT takes keys as suffixes, so one that ends another is anchored."""
    names = list(names)
    ends = {name: any(other.endswith("." + name) for other in names) for name in names}
    return {name: "^" + name if ends[name] else name for name in names}

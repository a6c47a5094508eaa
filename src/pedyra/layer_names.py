"""Where a layer sits in its model, read off its name."""

from __future__ import annotations


def layer_place(name: str) -> tuple[str, int]:
    """Module type and depth: encoder.layer.3.attention.self.query -> (attention.self.query, 3).

    The depth is the first number in the name; a module outside of any block keeps its name and stands at depth 0, one
    that is itself the numbered one is of the type of its list: layers.3 -> (layers, 3).
    """
    parts = name.split(".")
    block = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return (name, 0) if block is None else (".".join(parts[block + 1 :]) or ".".join(parts[:block]), int(parts[block]))

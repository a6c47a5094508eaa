"""A layer's name says where it sits in its model; PEFT's patterns name it, and say its rank."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


def layer_place(name: str) -> tuple[str, int]:
    """Split a name into module type and depth: encoder.layer.3.attention.self.query -> (attention.self.query, 3).

    The depth is the first number in the name; a module outside of any block keeps its name and stands at depth 0, one
    that is itself the numbered one is of the type of its list: layers.3 -> (layers, 3).
    """
    parts = name.split(".")
    block = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return (name, 0) if block is None else (".".join(parts[block + 1 :]) or ".".join(parts[:block]), int(parts[block]))


def pattern_keys(names: Iterable[str]) -> dict[str, str]:
    """Give each layer name its key in `rank_pattern`, which means this layer alone: PEFT takes keys as regular
    expressions for the end of a name, so one that ends another name too is anchored, and "c++.q" is escaped."""
    names = list(names)
    ends = {name[dot + 1 :] for name in names for dot, character in enumerate(name) if character == "."}
    plain = {name: name if re.fullmatch(r"[\w.-]+", name) else re.escape(name) for name in names}
    return {name: "^" + key if name in ends else key for name, key in plain.items()}


def rank_fields(layers: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Make the fields of LoraConfig that say which layer has which (rank, scaling).

    `r` is the largest rank, and lora_alpha / r the scaling that most layers have: a reader that checks ranks against
    `r`, or that takes one scaling for all, is right by that alone. Where all layers are alike no pattern is written,
    since PEFT takes half of its time to load for them; else the patterns name every layer.
    """
    rank = max(rank for rank, _ in layers.values())
    # 12 digits, since s r / r need not be s to the last bit; a scaling of 0 switches its layer off.
    alike = {name: f"{scaling:.12g}" for name, (_, scaling) in layers.items() if scaling}
    usual = Counter(alike.values()).most_common(1)[0][0] if alike else "0"
    scaling = next((layers[name][1] for name, each in alike.items() if each == usual), 0.0)
    mixed = any(each != rank for each, _ in layers.values()) or [*alike.values()] != [usual] * len(layers)
    keys = pattern_keys(layers)
    listed = layers.items() if mixed else ()
    return {
        "r": rank,
        "lora_alpha": whole_number(scaling * rank),
        "rank_pattern": {keys[name]: each for name, (each, _) in listed},
        "alpha_pattern": {keys[name]: whole_number(each * times) for name, (each, times) in listed},
        "use_rslora": False,
        # All weights are on disk; PEFT would redo a start on loading, and refuse odd ranks for "orthogonal".
        "init_lora_weights": True,
    }


def whole_number(value: float) -> int | float:
    """Make a whole number an int, as readers expect of lora_alpha."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value

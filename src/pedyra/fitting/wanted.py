"""What a fit can be asked, once: Python, the command line, recipes and axolotl are made from these fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pedyra.errors import UserError


@dataclass(frozen=True)
class Shape:
    """What a smaller adapter has to look like for whoever serves it."""

    max_rank: int | None = None
    """No layer keeps more."""
    same_rank: bool = False
    """Every layer keeps the same rank."""
    multiple_of: int = 1
    """Ranks are multiples of it (or as many directions as the layer has)."""
    drop: Callable[[str], bool] | None = None
    """Layers that keep none."""
    least: int = 0
    """Every other layer keeps at least so many: 1 where a layer has more than its directions (DoRA's magnitude)."""

    def __post_init__(self) -> None:
        if self.max_rank is not None and self.max_rank < 1:
            raise UserError(f"max_rank is {self.max_rank}; a rank is at least 1")
        if self.multiple_of < 1:
            raise UserError(f"multiple_of is {self.multiple_of}; it must be at least 1")
        if self.max_rank is not None and self.max_rank < self.multiple_of:
            raise UserError(
                f"max_rank is {self.max_rank}, below multiple_of {self.multiple_of}: no rank is left; raise max_rank"
            )

    @property
    def is_free(self) -> bool:
        """Whether only what directions are worth says which of them stay."""
        return self.max_rank is None and not self.same_rank and self.multiple_of == 1 and self.drop is None

    def most(self, name: str, rank: int) -> int:
        """The largest rank of a layer that has `rank` directions."""
        if self.drop is not None and self.drop(name):
            return 0
        most = rank if self.max_rank is None else min(rank, self.max_rank)
        return most if most == rank else most - most % self.multiple_of

    def rounded(self, kept: int, most: int) -> int:
        """At least as many, in multiples."""
        return min(most, math.ceil(max(kept, self.least) / self.multiple_of) * self.multiple_of)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of a fit.

    Raises:
        ValueError: a value outside its range.
    """

    __pydantic_config__ = {"use_attribute_docstrings": True, "extra": "forbid"}  # for recipes and the command line

    tolerance: float | str = 0.01
    """Part of what fine-tuning won (the loss of the base model less the adapter's) that may be given up: 0.01, or
    "1%"."""
    parameters: int | None = None
    """Take the largest size of at most so many parameters instead, whatever it does to the loss."""
    max_rank: int | None = None
    """No layer keeps a higher rank."""
    same_rank: bool = False
    """Every layer keeps the same rank, and one that has fewer keeps all of its own."""
    multiple_of: int = 1
    """Ranks are multiples of it, or all that a layer has."""
    drop_types: str | Sequence[str] = ()
    """Module types that keep none, such as q_proj; several are a list, or one text with commas."""
    recover: int | None = None
    """Steps of recovery towards what the whole adapter says, after which smaller sizes are tried where a cut alone
    leaves more than a quarter; 0: none. By default 160, or fewer where they would take a batch more than twice."""
    rows: int = 1024
    """To calibrate with, and for the proof, at most; half as many for the choice."""
    curve: bool = False
    """Measure the whole curve, not only what the choice needs."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tolerance", _part(self.tolerance))
        names = self.drop_types.split(",") if isinstance(self.drop_types, str) else self.drop_types
        object.__setattr__(self, "drop_types", tuple(filter(None, names)))
        if self.recover is not None and self.recover < 0:
            raise UserError(f"recover is {self.recover}; it is a number of steps, 0 or more")
        if self.parameters is not None and self.parameters < 1:
            raise UserError(f"parameters is {self.parameters}; an adapter has at least one")
        if self.rows < 16:
            raise UserError(f"rows is {self.rows}; a fit takes at least 16")
        self._shape(None, 0)

    @property
    def part(self) -> float:
        """The tolerance as a number."""
        return float(self.tolerance)

    def shape(self, names: Sequence[str], more: bool) -> Shape:
        """What the ranks of an adapter have to look like.

        Args:
            names: its layers.
            more: whether layers have more than their directions: a magnitude (DoRA), or a bias.
        """
        if more and self.drop_types:
            raise UserError("drop_types empties layers, but each layer of this adapter has a magnitude or a bias too")
        return self._shape(by_type(self.drop_types, names) if self.drop_types else None, int(more))

    def _shape(self, drop: Callable[[str], bool] | None, least: int) -> Shape:
        return Shape(self.max_rank, self.same_rank, self.multiple_of, drop, least)


def _part(given: Any) -> float:
    """0.01, or a text such as 1% or 0.01, as a number in (0, 1)."""
    try:
        text = given.strip() if isinstance(given, str) else str(float(given))
        found = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except (TypeError, ValueError):
        found = math.nan
    if not 0 < found < 1:
        raise UserError(f"tolerance is {given!r}; it is a part of what was won, in (0, 1), such as 0.01 or 1%")
    return found


def by_type(types: Collection[str], names: Collection[str]) -> Callable[[str], bool]:
    """Whether a layer's name ends with one of these module types, as PEFT's target_modules match. Raises ValueError: a
    type that no layer has, or nothing is left."""
    for kind in types:
        if not any(_ends(name, kind) for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            raise UserError(f"drop_types names {kind!r}, which no layer of the adapter has; it has {', '.join(known)}")
    if all(any(_ends(name, kind) for kind in types) for name in names):
        raise UserError(f"drop_types names every layer of the adapter ({', '.join(types)}); leave one out")
    return lambda name: any(_ends(name, kind) for kind in types)


def _ends(name: str, kind: str) -> bool:
    return name == kind or name.endswith(f".{kind}")

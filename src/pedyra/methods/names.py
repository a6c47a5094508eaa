"""The methods stand here by the names that recipes have for them, in the order of a table, with the homes of their
classes. It loads no torch until a class is asked for, so that a wrong name is told at once."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any

from pedyra.errors import UserError
from pedyra.lora.spelling import did_you_mean

CLASSES: dict[str, tuple[str, str]] = {
    "lora+": ("LoraPlus", "pedyra.methods.loraplus"),
    "randlora": ("RandLora", "pedyra.methods.randlora"),
    "adalora": ("AdaLora", "pedyra.methods.adalora"),
    "adalora-svd": ("AdaLora", "pedyra.methods.adalora"),
    "increlora": ("IncreLora", "pedyra.methods.increlora"),
    "triadaptlora": ("TriAdaptLora", "pedyra.methods.triadaptlora"),
    "elalora": ("ElaLora", "pedyra.methods.elalora"),
    "dylora": ("DyLora", "pedyra.methods.dylora"),
    "rasa": ("Rasa", "pedyra.methods.rasa"),
    "sora": ("Sora", "pedyra.methods.sora"),
    "eva": ("Eva", "pedyra.methods.eva"),
    "gora": ("Gora", "pedyra.methods.gora"),
    "autolora": ("AutoLora", "pedyra.methods.autolora"),
    "prune": ("Prune", "pedyra.methods.ablations"),
    "expand": ("Expand", "pedyra.methods.ablations"),
    "random": ("RandomMoves", "pedyra.methods.ablations"),
    "mask": ("Mask", "pedyra.methods.ablations"),
    "pedyra": ("PeDyra", "pedyra.pe_dyra.method"),
}
"""Name -> class and module. `adalora` is PEFT's own, of an AdaLoraConfig, and `adalora-svd` that of a LoraConfig."""
NAMES = ("lora", "lora+", "pissa", "dora", "qlora", *(name for name in CLASSES if name != "lora+"))


def check_method(name: str) -> None:
    """Raise ValueError unless there is a method of this name; the message names the nearest."""
    if name not in NAMES:
        raise UserError(f"method {name!r} is unknown; {did_you_mean(name, NAMES)}")


def class_of(name: str) -> Any:
    """Return the class of a method; None where a config of PEFT is all of it."""
    check_method(name)
    home = CLASSES.get(name)
    return None if home is None else getattr(import_module(home[1]), home[0])


def setting_names(name: str) -> list[str]:
    """List the settings of a method: the fields of its class."""
    kind = class_of(name)
    names = [] if kind is None else [each.name for each in fields(kind) if each.init]
    return [each for each in names if (name, each) != ("adalora", "budget")]  # which PEFT's own lacks


def field_docs(kind: type) -> dict[str, str]:
    """Return what stands below each field of a dataclass, its bases' included, in one line each."""
    docs: dict[str, str] = {}
    for base in (base for base in reversed(kind.__mro__) if is_dataclass(base)):
        body = next(node.body for node in ast.parse(inspect.getsource(base)).body if isinstance(node, ast.ClassDef))
        for field, below in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                docs[field.target.id] = " ".join(str(getattr(below.value, "value", "")).split())
    return docs


def make_method(name: str, settings: Mapping[str, Any], seed: int = 0) -> Any:
    """Make a method with these settings; None where a config of PEFT is all of it. `seed` is for one that has a seed
    and none in its settings. Raises ValueError: an unknown name or setting, with the nearest, or a value."""
    known = setting_names(name)
    for key in settings:
        if key not in known:
            hint = did_you_mean(key, known, otherwise=f"it has {', '.join(known) or 'none'}")
            raise UserError(f"method.{key} is no setting of method {name}; {hint}")
    if not known:
        return None
    try:
        return class_of(name)(**({"seed": seed} if "seed" in known else {}) | dict(settings))
    except UserError as error:
        raise UserError(f"method.{error}") from None

"""Every method by name, in the order of a table. Listing them imports no torch."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import Any

from pedyra.methods.method import Adaptation, Method, Prepare


def _prepare_in(module: str, function: str = "prepare") -> Prepare:
    """`function` of pedyra.methods.<module>, imported when it is first called."""

    def prepare(*args: Any, **kwargs: Any) -> Adaptation:
        return getattr(import_module(f"pedyra.methods.{module}"), function)(*args, **kwargs)

    return prepare


METHODS: dict[str, Method] = {
    method.name: method
    for method in (Method("lora", "LoRA (Hu et al. 2021), PEFT's own", _prepare_in("delegated", "prepare_lora")),)
}


def get_method(name: str) -> Method:
    """The method of this name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name in METHODS:
        return METHODS[name]
    near = get_close_matches(name, METHODS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(METHODS)}"
    raise ValueError(f"method {name!r} is unknown; {hint}")

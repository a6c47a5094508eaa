"""The command line has a method with settings as NAME[:key=value,...], whose keys are those of a recipe."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from pedyra.app.yaml_file import parse_yaml
from pedyra.errors import UserError
from pedyra.methods.names import class_of, make_method
from pedyra.methods.registry import METHODS, get_method


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A method, and what is changed of it."""

    text: str
    """The method as it was written on the command line."""
    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def moves_ranks(self) -> bool:
        return METHODS[self.name].moves_ranks

    @property
    def digest(self) -> str:
        """Return eight digits of the settings, "" where ranks stay: rows of older defaults are other rows."""
        if not self.moves_ranks:
            return ""
        content = json.dumps([class_of(self.name)().to_dict(), self.settings], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:8]


def parse_method(text: str) -> MethodSpec:
    """Return the method that is written so, e.g. `lora+:ratio=4`, or `pedyra:moves=4`.

    Keys are settings of the method, and values are YAML: 1e-3 is a number.
    """
    name, colon, rest = text.partition(":")
    get_method(name)
    settings = _settings(rest, text) if colon else {}
    try:
        make_method(name, settings)
    except UserError as error:
        raise UserError(f"method {text!r}: {str(error).removeprefix('method.')}") from None
    return MethodSpec(text=text, name=name, settings=settings)


def _settings(text: str, whole: str) -> dict[str, Any]:
    try:
        settings = parse_yaml("{" + re.sub(r"\s*=\s*", ": ", text) + "}", "method")
    except ValueError:
        settings = None
    if not settings or None in settings.values() and not re.search(r"=\s*(null|~)", text):
        raise UserError(f"method {whole!r} is not of the form NAME:key=value,key=value")
    return {str(key): value for key, value in settings.items()}

"""The command line has a method with settings as NAME[:key=value,...], whose keys are those of a recipe."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from pedyra.app.yaml_file import parse_yaml
from pedyra.errors import UserError
from pedyra.lora.spelling import did_you_mean
from pedyra.methods.registry import METHODS, get_method
from pedyra.pe_dyra.config import RANK_FIELDS, RankSettings


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A method, and what is changed of it."""

    text: str
    """The method as it was written on the command line."""
    name: str
    rank: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def moves_ranks(self) -> bool:
        return METHODS[self.name].moves_ranks

    @property
    def digest(self) -> str:
        """Return eight digits of the rank settings, "" where ranks stay: rows of older defaults are other rows."""
        if not self.moves_ranks:
            return ""
        content = json.dumps([RankSettings().to_dict(), self.rank], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:8]


def parse_method(text: str) -> MethodSpec:
    """Return the method that is written so, e.g. `lora+:ratio=4`, or `pedyra:moves=4`.

    A key is a setting of the method's own, else a field of RankSettings. Values are YAML, and 1e-3 is a number.
    """
    name, colon, rest = text.partition(":")
    method = get_method(name)
    given = _settings(rest, text) if colon else {}
    own = method.setting_names
    known = [*own, *(RANK_FIELDS if method.moves_ranks else [])]
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known, otherwise=f"it has {', '.join(known) or 'none'}")
            raise UserError(f"method {text!r}: {key!r} is no setting of {name}; {hint}")
    return MethodSpec(
        text=text,
        name=name,
        settings={key: value for key, value in given.items() if key in own},
        rank={key: value for key, value in given.items() if key not in own},
    )


def _settings(text: str, whole: str) -> dict[str, Any]:
    try:
        found = parse_yaml("{" + re.sub(r"\s*=\s*", ": ", text) + "}", "method")
    except ValueError:
        found = None
    if not found or None in found.values() and not re.search(r"=\s*(null|~)", text):
        raise UserError(f"method {whole!r} is not of the form NAME:key=value,key=value")
    return {str(key): value for key, value in found.items()}

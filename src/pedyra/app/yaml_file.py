"""Settings in YAML files: how they are read, overridden on the command line, and how a mistake in them is told."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pedyra.lora.spelling import did_you_mean


def read_settings(path: Path, overrides: Sequence[str], *, what: str, starts_with: str) -> dict[str, Any]:
    """The mapping in a YAML file, with `key.path=value` overrides (values are YAML).

    `what` the file is and the key it typically `starts_with` are for the messages. Raises ValueError, one line, for a
    file that is missing or no YAML mapping, and an override without `=`.
    """
    if path.is_dir():
        raise ValueError(f"{what} {str(path)!r} is a folder; give the path of a YAML file")
    if not path.is_file():
        raise ValueError(f"{what} {str(path)!r} does not exist; give the path of a YAML file")
    content = parse_yaml(path.read_bytes(), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{what} {str(path)!r} is no mapping of keys to values; it starts with e.g. `{starts_with}:`")
    for override in overrides:
        _apply_override(content, override)
    return content


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number and `no` as text, as YAML 1.2 does and writers of recipes expect.

    A key that is given twice is a mistake there, too, of which SafeLoader would take the second.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._looked_at: set[yaml.Node] = set()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given: set[tuple[str, str]] = set()
        for key, _ in () if node in self._looked_at else node.value:  # what merge keys add comes later, and may repeat
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in given:
                    told = f"key {key.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, told, key.start_mark)
                given.add((key.tag, key.value))
        self._looked_at.add(node)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        self._looked_at.add(node)
        super().flatten_mapping(node)


# In YAML 1.1 `eval_strategy: no` would be false; only true and false are.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_NUMBER = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(*_NUMBER)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also puts quotes around text which `_Loader`, and not YAML 1.1, would take for a number."""


_Dumper.add_implicit_resolver(*_NUMBER)


def to_yaml(content: Any) -> str:
    """Text that `parse_yaml` reads as `content` again, keys in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


MOST_NODES, DEEPEST = 100_000, 50
"""Of a YAML file, its aliases written out: a few lines of aliases of aliases would be more than any memory holds."""


def parse_yaml(text: str | bytes, where: str) -> Any:
    """What YAML 1.2 text holds; JSON is a part of it. Raises ValueError, one line that begins with `where`."""
    try:
        loader = _Loader(text if isinstance(text, str) else text.decode("utf-8-sig"))
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, DEEPEST, {}) > MOST_NODES:
            raise ValueError(f"its aliases make more than {MOST_NODES:,} values")
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"{where} is not valid YAML: it is nested too deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no text: {error}; give the path of a YAML file") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: an impossible date, no text
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def _size(node: yaml.Node, depth: int, known: dict[yaml.Node, int]) -> int:
    """How many values are in it, its aliases written out."""
    if depth == 0:  # an alias inside of what it stands for, too
        raise RecursionError
    if node not in known:
        pairs = node.value if isinstance(node, yaml.MappingNode) else [node.value]
        parts = [part for pair in pairs for part in pair] if not isinstance(node, yaml.ScalarNode) else []
        known[node] = 1 + sum(_size(part, depth - 1, known) for part in parts)
    return known[node]


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r} is not of the form key=value, e.g. training.max_steps=100")
    *parents, last = key.split(".")
    section = content
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise ValueError(f"override {override!r}: {parent} is a value, not a section with keys")
    section[last] = parse_yaml(value, f"override {override!r}")


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"lora": {"r": 8}} -> {"lora.r": 8}."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first key whose value has changed, with both values, and how many others have; None if none has."""
    old, new = flat(before), flat(now)
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if not changed:
        return None
    # A section that was empty and has keys now is told by its keys.
    changed = [key for key in changed if {} not in (old.get(key), new.get(key))] or changed
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    return f"{changed[0]} was {old.get(changed[0])!r} and is now {new.get(changed[0])!r}{more}"


def one_line(error: ValidationError, model: type[BaseModel], depth: int) -> str:
    """The first mistake as one line with its full key path, and how many other keys have one.

    Args:
        model: the schema that was broken, for the names of its keys.
        depth: how many keys deep settings are; pydantic's paths may go on below them, e.g. into a union.
    """
    messages: dict[tuple[int | str, ...], list[str]] = {}
    for mistake in error.errors(include_url=False):
        path = mistake["loc"][:depth]
        messages.setdefault(path, []).append(_message(mistake, [str(part) for part in path], model))
    told, *others = messages.values()
    return " or ".join(told) + (f" (and mistakes in {len(others)} more keys)" if others else "")


def _message(mistake: ErrorDetails, path: list[str], model: type[BaseModel]) -> str:
    key = ".".join(path)
    if mistake["type"] == "extra_forbidden":
        known = _keys_at(model, path[:-1])
        return f"unknown key {key!r}; {did_you_mean(path[-1], known, prefix=key.removesuffix(path[-1]))}"
    if mistake["type"] == "missing":
        return f"key {key!r} is required"
    if mistake["type"] == "value_error":
        return mistake["msg"].removeprefix("Value error, ")
    return f"{key} is {mistake['input']!r}: {mistake['msg']}"


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """The keys of the section at `path`; a part of the path may be a key of a dict of sections."""
    section: Any = model
    for part in path:
        # dict[str, Section] -> Section
        section = section.model_fields[part].annotation if hasattr(section, "model_fields") else get_args(section)[-1]
    return list(section.model_fields)

"""Settings are read from YAML files and overridden on the command line; a mistake in them is reported in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from pedyra.errors import UserError, as_user_error
from pedyra.lora.spelling import did_you_mean


def read_settings(path: Path, overrides: Sequence[str], *, what: str, starts_with: str) -> dict[str, Any]:
    """Read the mapping in a YAML file, with `key.path=value` overrides (values are YAML); `what` the file is and the
    key it typically `starts_with` are for the messages."""
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{what} {str(path)!r} {problem}; give the path of a YAML file")
    content = parse_yaml(path.read_bytes(), str(path))
    if not isinstance(content, dict):
        raise UserError(f"{what} {str(path)!r} is no mapping of keys to values; it starts with e.g. `{starts_with}:`")
    for override in overrides:
        _apply_override(content, override)
    return content


def _yaml() -> YAML:
    """Make a reader of YAML 1.2, in which `no` is text, 1e-3 a number, and a duplicate key an error."""
    yaml = YAML(typ="safe", pure=True)  # the other one, in C, reads YAML 1.1
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    return yaml


def to_yaml(content: Any) -> str:
    """Write text that `parse_yaml` reads as `content` again, keys in their order."""
    text = StringIO()
    _yaml().dump(content, text)
    return text.getvalue()


def parse_yaml(text: str | bytes, where: str) -> Any:
    """Read YAML 1.2 text, of which JSON is a part; the line about a mistake begins with `where`."""
    kinds = (YAMLError, ValueError, RecursionError)  # ValueError: bytes that are no text, a date that cannot be
    with as_user_error(f"{where} is not valid YAML", *kinds, reason=_reason):
        return _yaml().load(text if isinstance(text, str) else text.decode("utf-8-sig"))


def _reason(error: Exception) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"
    return str(error)


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} is not of the form key=value, e.g. training.max_steps=100")
    *parents, last = key.split(".")
    section = content
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        if parent == "method" and isinstance(section[parent], str):  # a bare name, which gets settings
            section[parent] = {"name": section[parent]}
        section = section[parent]
        if not isinstance(section, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section with keys")
    section[last] = parse_yaml(value, f"override {override!r}")


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Make {"lora.r": 8} of {"lora": {"r": 8}}."""
    result: dict[str, Any] = {}
    for key, value in section.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return result


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Describe the first key with another value, with both values and the number of other such keys; None if equal."""
    old, new = flat(before), flat(now)
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if not keys:
        return None
    # A section that was empty is described by its new keys.
    keys = [key for key in keys if {} not in (old.get(key), new.get(key))] or keys
    more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
    return f"{keys[0]} was {old.get(keys[0])!r} and is now {new.get(keys[0])!r}{more}"


def one_line(error: ValidationError, model: type[BaseModel], depth: int) -> str:
    """Describe the first mistake in one line with its full key path, and count the other keys with mistakes. `depth` is
    the length of a key path at the first mistake; pydantic's own paths may be longer, e.g. in a union."""
    mistakes: dict[tuple[int | str, ...], list[ErrorDetails]] = {}
    for mistake in error.errors(include_url=False):
        mistakes.setdefault(mistake["loc"][:depth], []).append(mistake)
    (path, first), *others = mistakes.items()
    message = " or ".join(_message(mistake, [str(part) for part in path], model) for mistake in first)
    return message + (f" (and mistakes in {len(others)} more keys)" if others else "")


def _message(mistake: ErrorDetails, path: list[str], model: type[BaseModel]) -> str:
    key = ".".join(path)
    if mistake["type"] == "extra_forbidden":
        names = _keys_at(model, path[:-1])
        if elsewhere := getattr(model, "elsewhere", {}).get(key):
            return f"unknown key {key!r}; did you mean {elsewhere!r}?"
        return f"unknown key {key!r}; {did_you_mean(path[-1], names, prefix=key.removesuffix(path[-1]))}"
    if mistake["type"] == "missing":
        return f"key {key!r} is required"
    if mistake["type"] == "value_error":
        if not isinstance(cause := mistake.get("ctx", {}).get("error"), UserError):
            raise cause or AssertionError(mistake)  # a bug in a validator of ours
        return mistake["msg"].removeprefix("Value error, ")
    return f"{key} is {mistake['input']!r}: {mistake['msg']}"


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """List the keys of the section at `path`, which may lead through a dict of sections."""
    section: Any = model
    for part in path:
        # dict[str, Section] -> Section
        section = section.model_fields[part].annotation if hasattr(section, "model_fields") else get_args(section)[-1]
        if type(None) in get_args(section):  # Section | None
            section = next(each for each in get_args(section) if each is not type(None))
    return list(section.model_fields)

"""Every key of a recipe as a page of Markdown, from the schema that checks it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pedyra.app.recipe import TRAINING_DEFAULTS

OPENING = """\
# Every key of a recipe

A recipe is one training run, as YAML. `pedyra train recipe.yaml lora.r=4 seed=1` changes keys on the command line,
where values are YAML too (quote what has braces: `data.template="'{question}'"`). `pedyra schema` prints the same as a
JSON schema for editors. Only `model.name` and `data.source` must be given.
"""
METHOD = """`method: sora` is SoRA with its defaults, and `method: {name: sora, l1: 1.3}` changes one of them. The names
without settings are `lora`, `pissa`, `dora` and `qlora`."""
TITLES = {
    "model": "The base model",
    "data": "Rows, what their columns mean, and how they are split",
    "lora": "The LoRA every method begins with",
    "fit": "How small the adapter may be, asked at the end of the run",
}


def recipe_page(schema: Mapping[str, Any]) -> str:
    """The page of a `recipe_schema()`."""
    properties = schema["properties"]
    plain = {name: entry for name, entry in properties.items() if name not in (*TITLES, "method")}
    parts = [OPENING, "## At the top\n", *_table(plain)]
    forms = [form["properties"] for form in properties["method"]["anyOf"][1:]]
    parts += ["", "## method: its name, or its name and the fields of its class\n", METHOD]
    for settings in forms:
        name = settings["name"]["const"]
        if own := {key: entry for key, entry in settings.items() if key != "name"}:
            parts += ["", f"### {name}\n", *_table(own, "method.")]
    for name, title in TITLES.items():
        entry = properties[name]
        entry = next((each for each in entry.get("anyOf", ()) if "$ref" in each), entry)  # one that may be left out
        section = schema["$defs"][entry["$ref"].rpartition("/")[2]]
        parts += ["", f"## {name}: {title}\n", *_table(section["properties"], f"{name}.")]
    parts += ["", "## generate: test sets that the model answers in its own words\n"]
    parts += _table(schema["$defs"]["GenerateSection"]["properties"], "generate.<set>.")
    parts += ["", "## training: arguments of `transformers.TrainingArguments`\n"]
    parts += ["By name, with its own defaults but for these:\n", "| key | default |", "| --- | --- |"]
    parts += [f"| `training.{name}` | {_code(value)} |" for name, value in TRAINING_DEFAULTS.items()]
    return "\n".join(parts)


def _table(properties: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    yield "| key | values | default | |"
    yield "| --- | --- | --- | --- |"
    for name, entry in properties.items():
        default = _code(entry["default"]) if "default" in entry else ""
        told = " ".join(entry.get("description", "").split()).replace("|", "\\|").replace("<", "&lt;")
        yield f"| `{prefix}{name}` | {_values(entry)} | {default} | {told} |"


def _values(entry: Mapping[str, Any]) -> str:
    """What may be given, in words; null is told by the default."""
    if "enum" in entry:
        return ", ".join(str(choice) for choice in entry["enum"] if choice is not None)
    if "anyOf" in entry:
        return " or ".join(dict.fromkeys(_values(part) for part in entry["anyOf"] if part.get("type") != "null"))
    if entry.get("type") == "array":
        return f"list of {_values(entry['items'])}"
    limits = [f"{sign} {entry[key]}" for key, sign in _LIMITS.items() if key in entry]
    return " ".join([_WORDS.get(str(entry["type"]), str(entry["type"])), ", ".join(limits)]).strip()


_WORDS = {"boolean": "true or false", "string": "text", "object": "mapping"}
_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _code(value: Any) -> str:
    return f"`{json.dumps(value)}`"

"""Spoils a file at random: its bytes and lines, or one value or key of what it holds as JSON or YAML."""

from __future__ import annotations

import contextlib
import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**70, -(2**70), 0.5, 1e308, math.inf, math.nan, "", "x", "x" * 2000, "\0", "../.."),
    *("(a+)+$", "(.*.*.*.*.*.*.*.*)*x", "(", "[", "{x:>99999999999}", "{", "{0.__class__}", "é", "all", "1e9", "nan"),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": {}}}, DEEP, [1] * 500, "2001-99-99", "\ud800", "/"),
]
LAUGHS = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
YAML = [
    *("&a [*a]", "*b", "<<: *c", "? {}", "!!python/object:os.system x", "%YAML 9", "---\n---", "- - - -", "\t", "\x07"),
    "\na: &a [x, x, x, x, x, x, x, x]\n" + LAUGHS,
]


def spoil_bytes(data: bytes, chance: random.Random) -> bytes:
    at, length = chance.randrange(len(data) + 1), min(len(data), 1 << chance.randrange(10))
    kind = chance.randrange(6)
    if kind == 0 and data:
        spoilt = bytearray(data)
        for _ in range(chance.choice([1, 1, 3, 30])):
            spoilt[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        return bytes(spoilt)
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[at + length :]
    if kind == 3:
        return data[:at] + data[at : at + length] * 2 + data[at + length :]
    if kind == 4:
        return data[:at] + chance.randbytes(length) + data[at:]
    lines = data.split(b"\n")
    chance.shuffle(lines)
    return b"\n".join(lines)


def spoil_value(value: Any, chance: random.Random) -> Any:
    """One value of it, however deep, is another, gone, or under another key."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key, odd = chance.choice(list(value)), chance.random()
        if odd < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if odd < 0.15:
            return {chance.choice(["x", "", key + "s", "r"]) if k == key else k: v for k, v in value.items()}
        return {**value, key: spoil_value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        at = chance.randrange(len(value))
        return [*value[:at], spoil_value(value[at], chance), *value[at + 1 :]]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and chance.random() < 0.3:
        return value * chance.choice([-1, 10, 1000, 0.5])
    return chance.choice(ODD)


def spoil(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    with contextlib.suppress(ValueError, yaml.YAMLError, UnicodeError):
        if chance.random() < 0.7 and path.suffix in (".json", ".jsonl", ".yaml"):
            if path.suffix == ".json":
                text = json.dumps(spoil_value(json.loads(data), chance))
            elif path.suffix == ".jsonl":
                lines = data.decode().splitlines()
                at = chance.randrange(len(lines))
                lines[at] = json.dumps(spoil_value(json.loads(lines[at]), chance))
                text = "\n".join(lines) + "\n"
            elif chance.random() < 0.2:
                text = data.decode() + "\nz: " + chance.choice(YAML)
            else:
                text = yaml.safe_dump(spoil_value(yaml.safe_load(data), chance), allow_unicode=True)
            path.write_text(text)
            return
    path.write_bytes(spoil_bytes(data, chance))

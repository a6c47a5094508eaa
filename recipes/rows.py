"""Rows that packages carry: texts on which the rank of a LoRA may bind, and a task of several classes.

    python recipes/rows.py language nb-NO data/language   Debian's handbook in Norwegian: apt install debian-handbook
    python recipes/rows.py rot13 en-US data/rot13         the same book in English, in other letters (rot13)
    python recipes/rows.py facts 500 data/facts           a phone book of 500 names that nobody has
    python recipes/rows.py docstrings torch,sklearn,pandas,scipy data/docstrings   which package says this?

Each writes train.jsonl and test.jsonl with the columns `prompt` and `text`, or `text` and `label`. Of the handbook
every fifth page is held out, of a package every fifth file. A fact cannot be inferred from others, so that the test
rows of the phone book are its training rows.
"""

import ast
import codecs
import json
import random
import re
import sys
import warnings
from collections.abc import Iterable
from html import unescape
from importlib.resources import files
from pathlib import Path
from typing import Any

BOOK = Path("/usr/share/doc/debian-handbook/html")
SHORTEST = 200  # letters of a paragraph; what is shorter is a caption or an entry of a list


def paragraphs(page: Path) -> list[str]:
    """The text of each paragraph of a page, without its markup."""
    marked_up = re.findall(r'<div class="para">(.*?)</div>', page.read_text(encoding="utf-8"), re.DOTALL)
    return [" ".join(unescape(re.sub(r"<[^>]+>", "", text)).split()) for text in marked_up]


def language(name: str) -> dict[str, list[tuple[str, str]]]:
    pages = sorted((BOOK / name).glob("*.html"))
    if not pages:
        raise SystemExit(f"{BOOK / name} has no pages; install debian-handbook, or name one of its languages")
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    # What a translation still has in English is left out. A paragraph of two pages stays on the side of the first.
    english = (BOOK / "en-US").glob("*.html") if name != "en-US" else ()
    seen = {text for page in english for text in paragraphs(page)}
    for number, page in enumerate(pages):
        for text in paragraphs(page):
            if len(text) >= SHORTEST and text not in seen:
                seen.add(text)
                rows["train" if number % 5 else "test"].append(("", text))
    return rows


def rot13(name: str) -> dict[str, list[tuple[str, str]]]:
    return {split: [("", codecs.encode(text, "rot13")) for _, text in rows] for split, rows in language(name).items()}


def facts(number: str) -> dict[str, list[tuple[str, str]]]:
    count = int(number)
    draw = random.Random(0)
    syllables = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]

    def name(length: int) -> str:
        return "".join(draw.choices(syllables, k=length)).capitalize()

    names: dict[str, str] = {}
    while len(names) < count:
        names[f"{name(2)} {name(3)}"] = "".join(draw.choices("0123456789", k=8))
    rows = [(f"Telephone of {name}:", f" {number}") for name, number in names.items()]
    return {"train": rows, "test": rows}


def docstrings(packages: str) -> dict[str, list[tuple[str, int]]]:
    every: dict[str, list[list[tuple[str, int]]]] = {"train": [], "test": []}
    for label, name in enumerate(packages.split(",")):
        texts: dict[str, dict[str, int]] = {"train": {}, "test": {}}
        for number, file in enumerate(sorted(Path(str(files(name))).rglob("*.py"))):
            for text in documented(file):
                # The name of the package would say all.
                text = re.sub(name, "it", text, flags=re.IGNORECASE)
                if SHORTEST / 4 <= len(text) and text not in texts["train"]:
                    texts["train" if number % 5 else "test"][text] = label
        for split, rows in texts.items():
            every[split].append(list(rows.items()))
    draw, rows = random.Random(0), {}
    for split, parts in every.items():
        least = min(map(len, parts))
        rows[split] = draw.sample([row for part in parts for row in draw.sample(part, least)], least * len(parts))
    return rows


def documented(file: Path) -> Iterable[str]:
    """The first paragraph of each docstring of a module's functions and classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except SyntaxError:  # of a newer Python
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
            yield " ".join(text.split("\n\n")[0].split())


KINDS = {"language": language, "rot13": rot13, "facts": facts, "docstrings": docstrings}


def write(folder: Path, split: str, rows: Iterable[tuple[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("prompt", "text") if isinstance(next(iter(rows))[1], str) else ("text", "label")
    lines = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n" for row in rows]
    (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{folder}/{split}.jsonl: {len(lines)} rows")


def main(kind: str, what: str, folder: str) -> None:
    for split, rows in KINDS[kind](what).items():
        write(Path(folder), split, rows)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in KINDS:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])

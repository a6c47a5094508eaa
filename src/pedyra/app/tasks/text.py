"""Rows of one or two texts with a label, tokenised: classification, pairs, regression."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from pedyra.app.recipe_sections import DataSection
from pedyra.app.tasks.labels import Labels
from pedyra.app.tasks.lengths import num_cut, tell_cut
from pedyra.app.tasks.split import Rows


def encode(
    rows: Rows, data: DataSection, tokenizer: PreTrainedTokenizerBase, labels: Labels, side: str
) -> list[dict[str, Any]]:
    """The tokenizer's columns and `labels`, one dict a row; cut to max_length tokens, the longer of two texts first.

    Raises ValueError for a label that is none, and a text without tokens.
    """
    numbers = [labels.number(row[data.label]) for row in rows]
    texts = [str(row[data.text]) for row in rows]
    pairs = [str(row[data.text_pair]) for row in rows] if data.text_pair else None
    columns = tokenizer(texts, pairs, truncation=data.max_length is not None, max_length=data.max_length)
    tell_cut(num_cut(columns), len(rows), side, data.max_length)
    empty = next((index for index, ids in enumerate(columns["input_ids"]) if not len(ids)), None)
    if empty is not None:
        raise ValueError(f"row {empty + 1} has no tokens: column {data.text!r} holds {texts[empty]!r}; remove the row")
    return [
        {**{name: column[index] for name, column in columns.items()}, "labels": number}
        for index, number in enumerate(numbers)
    ]

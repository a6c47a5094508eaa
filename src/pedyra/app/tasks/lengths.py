"""How many tokens of a row a base takes, and what is said of rows that have more."""

from __future__ import annotations

import logging
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from pedyra.app.recipe_sections import DataSection

NO_LIMIT = 1_000_000
"""Tokenizers without a limit say 1e30."""

logger = logging.getLogger(__name__)


def positions_of(config: Any) -> int | None:
    """Tokens that a model with this configuration takes; None where positions are relative, and have no end."""
    relative = getattr(config, "position_embedding_type", None) == "relative"
    if relative or not getattr(config, "position_biased_input", True):  # the second is DeBERTa's name for it
        return None
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def with_limit(data: DataSection, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> DataSection:
    """The section with a max_length that the base takes. None is left where nothing has a limit.

    Where none is given, or more than the base's positions, it is what base and tokenizer both take.
    """
    own = tokenizer.model_max_length if tokenizer.model_max_length < NO_LIMIT else None
    if data.max_length is not None and (positions is None or data.max_length <= positions):
        return data
    limit = min((number for number in (positions, own) if number is not None), default=None)
    return data.model_copy(update={"max_length": limit})


def num_cut(columns: BatchEncoding) -> int:
    """Rows of which a fast tokenizer left something out; the slow ones do not say."""
    return sum(bool(row.overflowing) for row in columns.encodings or ())


def tell_cut(cut: int, rows: int, side: str, limit: int | None) -> None:
    """Log how many rows were longer than the limit, if any were."""
    if cut:
        logger.warning("%d of %d %s rows are longer than %s tokens and are cut there", cut, rows, side, limit)

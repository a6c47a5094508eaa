"""The prompt and the chat of a row are tokenised, up to the length that the base takes."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from datetime import date
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from pedyra.app.recipe_sections import DataSection
from pedyra.errors import UserError

NO_LIMIT = 1_000_000  # tokenizers without a limit say 1e30

DAY = date(2026, 1, 1)
"""The date in every chat: templates that write today's (Llama 3.2, SmolLM3, gpt-oss) would give other tokens on the
next day, and a run could be neither resumed nor fitted."""
_WRITES_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

logger = logging.getLogger(__name__)


def positions_of(config: Any) -> int | None:
    """Count the tokens that a model with this config takes; None where positions are relative, and have no end."""
    relative = getattr(config, "position_embedding_type", None) == "relative"
    if relative or not getattr(config, "position_biased_input", True):  # the second is DeBERTa's name for it
        return None
    count = getattr(config, "max_position_embeddings", None)
    # T5 publishes the length that it was trained with as n_positions, though its positions are relative. MPNet's are
    # relative too, but it also has a table of max_position_embeddings.
    if count is None and not hasattr(config, "relative_attention_num_buckets"):
        count = getattr(config, "n_positions", None)
    return count


def with_limit(data: DataSection, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> DataSection:
    """Give the section a max_length that base and tokenizer both take; None is left where nothing has a limit.

    The tokenizer's counts where positions have an end; of RoBERTa, whose positions begin after the padding, it alone
    knows the right one.
    """
    if data.max_length is not None and positions is None:
        return data
    own = tokenizer.model_max_length if tokenizer.model_max_length < NO_LIMIT else None
    limit = min((number for number in (data.max_length, positions, own) if number is not None), default=None)
    return data.model_copy(update={"max_length": limit})


def num_cut(columns: BatchEncoding) -> int:
    """Count the rows that a fast tokenizer truncated; slow ones do not report it."""
    return sum(bool(row.overflowing) for row in columns.encodings or ())


def tell_cut(count: int, rows: int, side: str, limit: int | None) -> None:
    """Log how many rows were truncated, if any were."""
    if count:
        logger.warning("%d of %d %s rows are longer than %s tokens and are cut there", count, rows, side, limit)


def prompt_text(row: dict[str, Any], column: str | None, template: str | None) -> str:
    """Fill the template from the row's columns, or read the row's prompt column."""
    if not template:
        return str(row[column or ""])
    try:
        return template.format_map(row)
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        raise UserError(
            f"the template {template!r:.120} cannot be filled from a row ({type(error).__name__}: {error}); a place is "
            f"a column's name in braces, and {{column:.500}} cuts a text"
        ) from error


def prompt_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenise the prompt of an answer, without the end token that some tokenizers append."""
    ids = tokenizer(text)["input_ids"]
    if ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        ids = ids[:-1]
    return ids


def tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """Read the tools that a chat may call from the column of this name, a list or JSON; None: it has none."""
    tools = row.get("tools") or None
    return json.loads(tools) or None if isinstance(tools, str) else tools


def chat_text(
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    *,
    ask: bool,
    tools: list[Any] | None = None,
) -> str:
    """Render a chat by its template, on `DAY`; with `ask`, up to the beginning of the assistant's answer."""
    if chat_template is None and tokenizer.chat_template is None:
        raise UserError("data.messages needs a chat template, and this tokenizer has none; give data.chat_template")
    try:
        template = tokenizer.get_chat_template(chat_template, tools)
        template = _WRITES_DATE.sub(lambda match: repr(DAY.strftime(match[2])), template)
        text = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=ask
        )
    except Exception as error:  # a template is a program, with errors of any kind
        raise UserError(
            f"the chat template refuses a row of data.messages ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); correct the row, or give another data.chat_template"
        ) from error
    assert isinstance(text, str)
    return text

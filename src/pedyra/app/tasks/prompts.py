"""The prompt of a row, as text and as tokens: the same for training and for generation."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


def prompt_text(row: dict[str, Any], column: str | None, template: str | None) -> str:
    """The template filled from the row's columns, or the row's prompt column."""
    return template.format_map(row) if template else str(row[column or ""])


def prompt_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a prompt that an answer goes on from: without the end token with which some tokenizers close texts."""
    ids = tokenizer(text)["input_ids"]
    if ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        ids = ids[:-1]
    return ids


def chat_text(
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    *,
    ask: bool,
    key: str = "data.messages",
) -> str:
    """A chat as its template writes it; with `ask`, up to where the assistant begins to answer.

    Raises ValueError where there is no chat template, or it refuses the messages.
    """
    if chat_template is None and tokenizer.chat_template is None:
        raise ValueError(f"{key} needs a chat template, and this tokenizer has none; give data.chat_template")
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=ask
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses a row of {key}: {error}") from error
    assert isinstance(text, str)
    return text

"""Prompts with answers, or chats, are tokenised for a causal LM whose loss is on the answers alone."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pedyra.app.recipe_sections import DataSection
from pedyra.app.tasks.sources import Rows
from pedyra.app.tasks.tokens import chat_text, prompt_text, prompt_tokens, tell_cut, tools_of
from pedyra.errors import UserError

IGNORED = -100  # torch's cross entropy ignores this label

logger = logging.getLogger(__name__)


def encode(rows: Rows, data: DataSection, tokenizer: PreTrainedTokenizerBase, side: str) -> list[dict[str, list[int]]]:
    """Make input_ids, attention_mask and labels of each row, cut to max_length tokens; labels are -100 off the answers.
    Prompts alone have no labels.

    Rows whose answer lies wholly beyond max_length are left out, and their number is logged.
    """
    features, num_long = [], 0
    if not data.labelled:
        return prompts(rows, data, tokenizer)
    for row in rows:
        ids, labels = _chat(row, data, tokenizer) if data.messages else _prompt_and_answer(row, data, tokenizer)
        num_long += data.max_length is not None and len(ids) > data.max_length
        ids, labels = ids[: data.max_length], labels[: data.max_length]
        # A label is predicted from the tokens before it, so the first one never counts.
        if any(label != IGNORED for label in labels[1:]):
            features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    tell_cut(num_long, len(rows), side, data.max_length)
    if not features:
        raise UserError(
            f"no {side} row has an answer within data.max_length {data.max_length} tokens: every prompt is longer, so "
            "raise it, or no chat has an assistant's turn"
        )
    if len(features) < len(rows):
        message = "%d of %d %s rows have no answer within data.max_length %d tokens and are left out"
        logger.warning(message, len(rows) - len(features), len(rows), side, data.max_length)
    return features


def prompts(rows: Rows, data: DataSection, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Make input_ids and attention_mask of prompts alone, cut to max_length tokens."""
    features = []
    for number, row in enumerate(rows, start=1):
        text = prompt_text(row, data.prompt, data.template)
        ids = prompt_tokens(text, tokenizer)[: data.max_length]
        if not text.strip() or not ids:
            raise UserError(
                f"prompt {number} of {len(rows)} is empty ({text!r:.20}), so nothing can go on from it; remove the row"
            )
        features.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
    return features


def _prompt_and_answer(
    row: dict[str, Any], data: DataSection, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Tokenise a prompt and its answer apart, since at generation the prompt is all there is."""
    text = prompt_text(row, data.prompt, data.template) if data.prompt or data.template else ""  # or a whole text
    prompt_ids = prompt_tokens(text, tokenizer)
    answer_ids = tokenizer(str(row[data.completion or ""]), add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        answer_ids = [*answer_ids, tokenizer.eos_token_id]
    return [*prompt_ids, *answer_ids], [*[IGNORED] * len(prompt_ids), *answer_ids]


def _chat(row: dict[str, Any], data: DataSection, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokenise a chat; an answer is the text that an assistant's turn adds to the prompt before it."""
    messages, tools = messages_of(row, data), tools_of(row)
    whole = chat_text(messages, tokenizer, data.chat_template, ask=False, tools=tools)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            before = chat_text(messages[:turn], tokenizer, data.chat_template, ask=True, tools=tools)
            after = chat_text(messages[: turn + 1], tokenizer, data.chat_template, ask=False, tools=tools)
            if not (after.startswith(before) and whole.startswith(after)):
                raise UserError(
                    "the chat template rewrites earlier turns, so the answers cannot be told apart; "
                    "give data.chat_template one whose text only grows"
                )
            spans.append((len(before), len(after)))
    encoding = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    # Some tokenizers leave spaces out of a token's offsets, so that a token of spaces has an empty span.
    labels = [
        token if any(start <= first - (first == last) and last <= end for start, end in spans) else IGNORED
        for token, (first, last) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    ]
    return encoding["input_ids"], labels


def messages_of(row: dict[str, Any], data: DataSection) -> list[dict[str, Any]]:
    """Read the chat of a row; refuse what is none, or begins with an answer."""
    messages = row[data.messages or ""]
    whole = isinstance(messages, list) and all(
        isinstance(each, dict) and {"role", "content"} <= {*each} for each in messages
    )
    if not whole or not messages or messages[0]["role"] == "assistant":
        raise UserError(
            f"column {data.messages!r} holds {messages!r:.80}; a chat is a list of {{role, content}} that begins "
            f"with a system or user message"
        )
    return [{**message, "content": _content(message, data)} for message in messages]


def _content(message: dict[str, Any], data: DataSection) -> str | None:
    """Read a message's text, None where it calls a tool. Text parts are joined, because a template that has no parts
    would render them as Python lists."""
    content = message["content"]
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return content
    raise UserError(f"column {data.messages!r} has a message whose content is {content!r:.80}; it is a text")


def answer_loss(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Sum the loss and count the answer tokens of each row, `(batch, 2)`, from logits `(batch, length, vocab)`, of
    which none are kept over an evaluation."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return token_losses(logits[:, :-1], labels[:, 1:])


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum the loss and count the targets of each row, `(batch, 2)`, where logits stand at what they predict."""
    losses = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return torch.stack([losses.sum(dim=1), (targets != IGNORED).sum(dim=1).float()], dim=1)

"""The loss is on the answers alone, for prompts and for chats; what cannot be answered is told."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from pedyra.app.models.base import load_tokenizer
from pedyra.app.recipe_sections import DataSection, ModelSection
from pedyra.app.tasks.causal_lm import encode
from pedyra.app.tasks.task import load_task

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(ModelSection(name="tiny-llama"))


def encoded(tokenizer: Any, row: dict[str, Any], **data: Any) -> tuple[str, list[str]]:
    """The text a row becomes, and the stretches of it that have a loss."""
    section = DataSection(source="toy", kind="causal_lm", **data)
    (one,) = encode([row], section, tokenizer, "training")
    assert len(one["input_ids"]) == len(one["labels"]) == len(one["attention_mask"])
    assert all(label in (-100, token) for token, label in zip(one["input_ids"], one["labels"], strict=True))
    stretches, last = [], -100
    for label in one["labels"]:
        if label != -100:
            stretches = [*stretches, [label]] if last == -100 else [*stretches[:-1], [*stretches[-1], label]]
        last = label
    return tokenizer.decode(one["input_ids"]), [tokenizer.decode(stretch) for stretch in stretches]


def test_a_prompt_has_no_loss_and_the_answer_ends(tokenizer: Any):
    row = {"p": "the plot is", "c": " dull"}
    assert encoded(tokenizer, row, prompt="p", completion="c") == ("<s>the plot is dull</s>", [" dull</s>"])


def test_a_template_is_filled_from_the_columns(tokenizer: Any):
    row = {"q": "1+1", "a": 2}
    whole, losses = encoded(tokenizer, row, template="Question: {q}\nAnswer: ", completion="a")
    assert (whole, losses) == ("<s>Question: 1+1\nAnswer: 2</s>", ["2</s>"])


def test_a_prompt_is_tokenised_as_it_will_be_at_generation(tokenizer: Any):
    section = DataSection(source="toy", kind="causal_lm", prompt="p", completion="c")
    (row,) = encode([{"p": "is it ", "c": "worth it"}], section, tokenizer, "training")
    prompt = tokenizer("is it ")["input_ids"]
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][: len(prompt) + 1] == [-100] * len(prompt) + [row["input_ids"][len(prompt)]]


def test_a_tokenizer_that_closes_texts_does_not_close_a_prompt():
    bert = load_tokenizer(ModelSection(name="tiny-bert"))
    assert encoded(bert, {"p": "the", "c": "plot"}, prompt="p", completion="c") == ("[CLS]theplot", ["plot"])


def test_spaces_within_an_answer_have_a_loss_where_a_tokenizer_leaves_them_out_of_its_offsets(tokenizer: Any):
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    chat = [{"role": "user", "content": "loop"}, {"role": "assistant", "content": "for x:\n        y   "}]
    assert encoded(tokenizer, {"m": chat}, messages="m")[1] == ["for x:\n        y   </s>\n"]


def test_every_turn_of_the_assistant_has_a_loss(tokenizer: Any):
    whole, losses = encoded(tokenizer, {"m": CHAT}, messages="m")
    assert whole == ("<s>user\nhi</s>\n<s>assistant\nhello</s>\n<s>user\nbye</s>\n<s>assistant\nso long</s>\n")
    assert losses == ["hello</s>\n", "so long</s>\n"]


def test_a_chat_template_of_the_recipe_is_used_where_the_tokenizer_has_none(tokenizer: Any):
    tokenizer.chat_template = None
    ask = "{% if add_generation_prompt %}[a]{% endif %}"
    template = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}" + ask
    whole, losses = encoded(tokenizer, {"m": CHAT}, messages="m", chat_template=template)
    assert (whole, losses) == ("[u]hi[a]hello[u]bye[a]so long", ["hello", "so long"])


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(tokenizer: Any):
    """Else the run would not know its rows again on the next day."""
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[a]{% endif %}"
    expected = ("01 Jan 2026[u]hi[a]hello[u]bye[a]so long", ["hello", "so long"])
    assert encoded(tokenizer, {"m": CHAT}, messages="m", chat_template=template) == expected
    tokenizer.chat_template = template
    assert encoded(tokenizer, {"m": CHAT}, messages="m") == expected


@pytest.mark.parametrize("as_json", [False, True])
def test_a_chat_is_told_its_tools(tokenizer: Any, as_json: bool, tmp_path: Path):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    template = "{% for t in tools %}<{{ t.function.name }}>{% endfor %}"
    template += "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[a]{% endif %}"
    row = {"m": CHAT[:2], "tools": json.dumps(tools) if as_json else tools, "other": 1}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**row, "m": CHAT[:2]}) + "\n" for _ in range(4)))
    section = DataSection(source=str(tmp_path / "rows.jsonl"), kind="causal_lm", messages="m", chat_template=template)
    task = load_task(section, tokenizer, seed=0)
    assert tokenizer.decode(task.train["input_ids"][0]) == "<weather>[u]hi[a]hello"


ASSISTANT = {"role": "assistant"}
REFUSED = [
    (None, CHAT, "needs a chat template, and this tokenizer has none; give data.chat_template"),
    ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", CHAT, "rewrites earlier turns"),
    ("{{ messages + 1 }}", CHAT, "the chat template refuses a row of data.messages .TypeError"),
    ("{% for m in messages %}{{ m.content }}", CHAT, "the chat template refuses a row .*TemplateSyntaxError"),
    ("{{ raise_exception('roles must alternate') }}", CHAT, "the chat template refuses a row .*: roles must alternate"),
    *(
        ("", chat, "column 'm' holds .*; a chat is a list of")
        for chat in ("hi", [{"role": "user"}], ["hi"], [], CHAT[1:])
    ),
    *(
        ("", [CHAT[0], {**ASSISTANT, "content": content}], "column 'm' has a message whose content is .*; it is a text")
        for content in (None, 5, [{"type": "image"}])
    ),
]


@pytest.mark.parametrize(("template", "chat", "told"), REFUSED)
def test_a_chat_that_cannot_be_written_is_told(tokenizer: Any, template: str | None, chat: Any, told: str):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=told):
        encoded(tokenizer, {"m": chat}, messages="m")


@pytest.mark.parametrize("place", ["{q!x}", "{q:.3d}", "{q.x}", "{a.b}"])
def test_a_place_that_a_row_cannot_fill_is_told(tokenizer: Any, place: str):
    with pytest.raises(ValueError, match=f"the template 'Question: {place}' cannot be filled from a row"):
        encoded(tokenizer, {"q": "1+1", "a": "2", "a.b": "3"}, template=f"Question: {place}", completion="a")


def test_the_texts_of_a_message_in_parts_are_one_text(tokenizer: Any):
    """A template that knows no parts would write them as Python does."""
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    chat = [CHAT[0], {"role": "assistant", "content": parts}, *CHAT[2:]]
    assert encoded(tokenizer, {"m": chat}, messages="m") == encoded(tokenizer, {"m": CHAT}, messages="m")


def test_rows_without_room_for_an_answer_are_left_out_and_counted(tokenizer: Any, caplog: pytest.LogCaptureFixture):
    section = DataSection(source="toy", kind="causal_lm", prompt="p", completion="c", max_length=6)
    rows = [{"p": "x" * 20, "c": "a"}, {"p": "xyz", "c": "abcdefgh"}]
    with caplog.at_level(logging.WARNING):
        kept = encode(rows, section, tokenizer, "training")
    assert [tokenizer.decode(row["input_ids"]) for row in kept] == ["<s>xyzab"]
    assert "1 of 2 training rows have no answer within data.max_length 6 tokens" in caplog.text
    with pytest.raises(ValueError, match="no training row has an answer within data.max_length 6 tokens"):
        encode(rows[:1], section, tokenizer, "training")


def test_a_first_token_is_no_answer_as_nothing_comes_before_it():
    bert: Any = load_tokenizer(ModelSection(name="tiny-bert"))
    without_cls: Any = processors.Sequence([])
    bert.backend_tokenizer.post_processor = without_cls
    with pytest.raises(ValueError, match="no training row has an answer"):
        encoded(bert, {"p": "", "c": "?"}, prompt="p", completion="c")

"""The tiny models' tokenizer reads everything, and knows the toy data's words."""

from __future__ import annotations

import pytest

from pedyra.app.models.tiny import tiny_tokenizer


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-llama"])
def test_any_text_survives_and_toy_words_are_tokens(name: str):
    tokenizer = tiny_tokenizer(name)
    text = "Ünicode ☃\tand\n\n12 'quotes'"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.tokenize("the plot is dull") == ["the", "Ġplot", "Ġis", "Ġdull"]


def test_every_call_gives_the_same_vocabulary():
    assert tiny_tokenizer("tiny-bert").get_vocab() == tiny_tokenizer("tiny-llama").get_vocab()


def test_special_tokens_stand_where_each_architecture_has_them():
    bert, llama = tiny_tokenizer("tiny-bert"), tiny_tokenizer("tiny-llama")
    assert bert.convert_ids_to_tokens(bert("the", "?")["input_ids"]) == ["[CLS]", "the", "[SEP]", "?", "[SEP]"]
    assert llama.convert_ids_to_tokens(llama("the")["input_ids"]) == ["<s>", "the"]
    assert llama.pad_token_id != llama.eos_token_id

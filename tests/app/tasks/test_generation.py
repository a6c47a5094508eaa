"""Texts are the same in a batch and alone, after a kill and without one; they end where they should."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from pedyra.app.models.base import load_model, load_tokenizer
from pedyra.app.recipe_sections import GenerateSection, ModelSection
from pedyra.app.tasks.generation import WRITING, SampleFile, write_texts
from pedyra.lora.files import read_rows

PROMPTS = ["the plot", "the cast is good. the score is", "a", "film is"]


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(ModelSection(name="tiny-llama"))


@pytest.fixture
def model(tokenizer: Any) -> Any:
    return load_model(ModelSection(name="tiny-llama"), "causal_lm", None, tokenizer, seed=0)


@pytest.fixture
def write(model: Any, tokenizer: Any, tmp_path: Path) -> Any:
    """write(prompts=PROMPTS, file="a.jsonl", **settings) -> what was written of every prompt."""

    def call(
        prompts: list[str] = PROMPTS,
        file: str = "a.jsonl",
        made_by: str = "",
        name: str = "s",
        ends: list[int] | None = None,
        **settings: Any,
    ) -> Any:
        section = GenerateSection(**{"max_new_tokens": 8, **settings})
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        made_of = [made_by, section.model_dump(include=WRITING), ids]
        kept = SampleFile(tmp_path / file, name, made_of)
        return write_texts(model, tokenizer, ids, section, kept, Console(file=StringIO()), ends or [])

    return call


def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone(write: Any, model: Any, tokenizer: Any):
    together = write()
    for prompt, sample in zip(PROMPTS, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(8):  # greedy by hand
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == prompt + sample.text
        assert (sample.finished, sample.tokens) == (False, 8)


def test_a_text_ends_before_an_end_token_and_before_a_stop_string(write: Any, model: Any, tokenizer: Any):
    (whole,) = write(["the plot"])
    tokens = tokenizer(whole.text, add_special_tokens=False)["input_ids"]
    stop = whole.text[5:8]
    (stopped,) = write(["the plot"], "stop.jsonl", stop=[stop, "never said"])
    assert stopped.text == whole.text[: whole.text.index(stop)] and stopped.finished
    ids = tokenizer("the plot", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        first = int(model(ids).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [first, 6]
    (ended,) = write(["the plot"], "end.jsonl")
    assert (ended.text, ended.finished, ended.tokens) == ("", True, 0)
    model.generation_config.eos_token_id = 6
    model.generation_config.forced_eos_token_id = 6  # as BART's settings have it: what is cut ends with it, too
    (cut,) = write(["the plot"], "forced.jsonl")
    assert (cut.finished, cut.tokens) == (False, 7)
    model.generation_config.forced_eos_token_id = None
    (closed,) = write(["the plot"], "turn.jsonl", ends=[first])  # the token that closes a turn
    assert closed == ended
    assert len(tokens) > 1


@pytest.mark.parametrize("beams", [1, 2])
def test_a_stop_string_that_begins_in_the_prompt_ends_nothing(write: Any, beams: int):
    (whole,) = write(["the plot"], beams=beams)
    stop = "t" + whole.text[:2]  # the prompt's last letter, and what is written first
    assert stop not in whole.text
    (written,) = write(["the plot"], "stop.jsonl", stop=[stop], beams=beams)
    assert written == whole


def test_a_killed_call_goes_on_and_gives_what_it_would_have_given(
    write: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = write(batch_size=2)
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join(lines[:3]) + lines[3][:20])  # the second batch was being written
    calls, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **given: calls.append(1) or generate(**given))
    assert write(file="b.jsonl", batch_size=2) == whole
    assert len(calls) == len(lines) // 2 - 1  # all but the first batch
    assert len(read_rows(tmp_path / "b.jsonl")) == len(lines)
    calls.clear()
    assert write(file="b.jsonl", batch_size=2) == whole and not calls


def test_texts_of_other_weights_settings_or_prompts_are_written_anew(write: Any, tmp_path: Path):
    write(made_by="one")
    for changes in ({"made_by": "two"}, {"max_new_tokens": 4}, {"prompts": ["x"]}):
        write(**changes)
        rows = read_rows(tmp_path / "a.jsonl")
        assert len({row["of"] for row in rows}) == 1 and len(rows) == (1 if "prompts" in changes else len(PROMPTS))


def test_two_sets_with_the_same_prompts_have_one_text_for_both(
    write: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = write(name="humaneval", source="one.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", None)  # nothing is written again
        assert write(name="humanevalplus", source="two.jsonl") == plain
    assert len(read_rows(tmp_path / "a.jsonl")) == len(PROMPTS)
    write(name="humanevalplus", source="two.jsonl", max_new_tokens=4)  # another length: texts of its own
    assert len(read_rows(tmp_path / "a.jsonl")) == 2 * len(PROMPTS)


def test_the_authors_taste_in_sampling_does_not_count(write: Any, model: Any):
    plain = write()
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, min_new_tokens=9)
    assert write(file="b.jsonl") == plain
    assert model.generation_config.repetition_penalty == 3.0

"""A row longer than its base is cut where the base ends, and it is said how many were."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, DebertaV2Config, GPT2Config, MPNetConfig, T5Config

from pedyra.app.models.base import load_tokenizer, positions
from pedyra.app.recipe_sections import DataSection, ModelSection
from pedyra.app.tasks.task import load_task
from pedyra.app.tasks.tokens import positions_of, with_limit

LONG = "the plot is good. " * 200
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "classification": ("tiny-bert", {"text": "text", "label": "label"}),
    "causal_lm": ("tiny-llama", {"prompt": "prompt", "completion": "text"}),
    "seq2seq": ("tiny-bart", {"prompt": "text", "completion": "prompt"}),
}


def loaded(folder: Path, kind: str, **data: Any) -> Any:
    """A task of twenty rows, of which five are longer than 512 tokens; one of them is held out."""
    model, columns = KINDS[kind]
    rows = [
        {"text": LONG if n % 4 == 0 else "the plot is bad", "label": n % 2, "prompt": "is it good?"} for n in range(20)
    ]
    for name, part in (("train", rows[:16]), ("held", rows[16:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    files = {"source": str(folder / "train.jsonl"), "validation": str(folder / "held.jsonl")}
    section = ModelSection(name=model)
    return load_task(
        DataSection(**{"kind": kind, **files, **columns, **data}), load_tokenizer(section), 0, positions(section)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length", [None, 4096])
def test_rows_beyond_the_positions_are_cut_and_counted(
    tmp_path: Path, kind: str, max_length: int | None, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        task = loaded(tmp_path, kind, max_length=max_length)
    for rows, count in ((task.train, 4), (task.eval, 1)):
        lengths = [len(ids) for ids in rows["input_ids"]]
        assert max(lengths) == 512 and lengths.count(512) == count
    assert "4 of 16 training rows are longer than 512 tokens" in caplog.text
    assert "1 of 4 validation rows are longer than 512 tokens" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_shorter_limit_holds_and_rows_that_fit_are_not_spoken_of(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    with caplog.at_level(logging.WARNING):
        task = loaded(tmp_path, kind, max_length=24)
        assert max(len(ids) for ids in task.train["input_ids"]) == 24
        assert "4 of 16 training rows are longer than 24 tokens" in caplog.text
        caplog.clear()
        monkeypatch.setitem(globals(), "LONG", "the plot is good")
        loaded(tmp_path, kind, max_length=24)
    assert "longer than" not in caplog.text


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (BertConfig(max_position_embeddings=40), 40),
        (T5Config(), None),
        (T5Config.from_dict({"n_positions": 512}), None),  # as it is published
        (MPNetConfig(max_position_embeddings=514), 514),  # relative, but there is a table of them
        (GPT2Config(n_positions=1024), 1024),
        (DebertaV2Config(relative_attention=True, position_biased_input=False), None),
    ],
)
def test_a_configuration_says_how_many_positions_there_are(config: Any, count: int | None):
    assert positions_of(config) == count


def test_the_limit_of_the_tokenizer_counts_where_positions_end():
    tokenizer = load_tokenizer(ModelSection(name="tiny-bert"))
    tokenizer.model_max_length = 510
    given = {None: 510, 600: 510, 512: 510, 40: 40}
    found = {n: with_limit(DataSection(source="toy", max_length=n), tokenizer, 514).max_length for n in given}
    assert found == given
    assert with_limit(DataSection(source="toy", max_length=None), tokenizer, None).max_length == 510
    assert with_limit(DataSection(source="toy", max_length=768), tokenizer, None).max_length == 768


def test_parts_of_a_context_have_a_length():
    with pytest.raises(ValueError, match="data.doc_stride 128 is not below data.max_length None"):
        DataSection(source="toy", kind="question_answering", max_length=None)

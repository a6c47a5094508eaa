"""Encoder-decoders: sources and answers are cut apart, ROUGE is by hand, a tiny BART learns to copy a sentence."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pedyra.app.models.base import load_model, load_tokenizer
from pedyra.app.recipe import Recipe
from pedyra.app.recipe_sections import DataSection, ModelSection
from pedyra.app.runs.evaluate import evaluate_run
from pedyra.app.runs.run import train_run
from pedyra.app.tasks.seq2seq import encode, rouge
from pedyra.lora.files import read_rows


def section(**changes: Any) -> DataSection:
    return DataSection(source="toy", kind="seq2seq", **{"prompt": "document", "completion": "summary", **changes})


@pytest.mark.parametrize(("model", "begins"), [("tiny-bart", "<s>"), ("tiny-t5", "")])
def test_source_and_answer_are_closed_as_the_model_is_used_to(model: str, begins: str):
    tokenizer = load_tokenizer(ModelSection(name=model))
    (row,) = encode([{"document": "the plot is dull", "summary": "dull"}], section(), tokenizer, "training")
    assert tokenizer.decode(row["input_ids"]) == f"{begins}the plot is dull</s>"
    assert tokenizer.decode(row["labels"]) == f"{begins}dull</s>"
    cut = section(max_length=3, max_target_length=2, prompt=None, template="summarize: {document}")
    (row,) = encode([{"document": "the plot", "summary": "dull dull dull"}], cut, tokenizer, "training")
    assert (len(row["input_ids"]), len(row["labels"])) == (3, 2)


def test_rouge_by_hand():
    # "cats sat" is stemmed to "cat sat". 2 of 3 given and 2 of 2 right words; 1 of 2 and 1 of 1 pairs.
    scores = rouge(["the cat sat", "x"], ["cats sat", "y"])
    assert scores["rouge1"] == pytest.approx(100 * (2 * (2 / 3) / (5 / 3)) / 2)
    assert scores["rouge2"] == pytest.approx(100 * (2 * (1 / 2) / (3 / 2)) / 2)
    # The longest common run of words with gaps: a c of "a b c" and "a c b".
    assert rouge(["a b c"], ["a c b"])["rougeL"] == pytest.approx(100 * 2 / 3)
    # Lsum takes each line for a sentence, and finds both of them in any order.
    scores = rouge(["one two\nthree four"], ["three four\none two"])
    assert (scores["rougeL"], scores["rougeLsum"]) == pytest.approx((50.0, 100.0))


def test_a_tiny_bart_learns_to_summarise(tmp_path: Path):
    console = Console(file=StringIO())

    def scores(steps: int) -> dict[str, float]:
        recipe = Recipe.model_validate(
            {
                "name": "toy",
                "method": "lora",
                "output_dir": str(tmp_path / str(steps)),
                "model": {"name": "tiny-bart"},
                "data": section(max_target_length=8, eval_rows=16).model_dump(exclude_unset=True),
                "generate": {"held_out": {"beams": 2}},
                "lora": {"r": 16, "alpha": 32},
                "training": {"max_steps": steps, "learning_rate": 1e-2, "eval_strategy": "no", "use_cpu": True},
            }
        )
        train_run(recipe, console=console)
        return evaluate_run(tmp_path / str(steps), console=console)

    before, after = scores(1), scores(80)
    assert before["rouge1"] < 40 and after["rouge1"] > 80 and after["rougeLsum"] > 80
    assert after["perplexity"] < before["perplexity"]
    rows = read_rows(tmp_path / "80" / "samples.jsonl")
    assert [row["row"] for row in sorted(rows, key=lambda row: row["row"])] == list(range(16))
    assert sum(not row["finished"] for row in rows) == after["unfinished"]


@pytest.mark.parametrize(
    ("model", "kind", "told"),
    [
        ("tiny-llama", "seq2seq", "cannot be loaded: Unrecognized configuration class .* AutoModelForSeq2SeqLM"),
        ("tiny-bart", "causal_lm", r"'tiny-bart' is an encoder-decoder \(bart\), .* without its encoder; .* seq2seq"),
        ("tiny-bert", "causal_lm", r"'tiny-bert' is an encoder \(bert\), which sees the tokens it is to predict"),
    ],
)
def test_a_model_of_another_kind_is_told_and_a_folder_of_it_too(model: str, kind: str, told: str, tmp_path: Path):
    section = ModelSection(name=model)
    tokenizer = load_tokenizer(section)
    with pytest.raises(ValueError, match=told):
        load_model(section, kind, None, tokenizer, seed=0)
    other = {"tiny-llama": "causal_lm", "tiny-bart": "seq2seq"}.get(model, "classification")
    load_model(section, other, 2, tokenizer, seed=0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=told.replace(f"'{model}' ", "")):
        load_model(ModelSection(name=str(tmp_path)), kind, None, tokenizer, seed=0)

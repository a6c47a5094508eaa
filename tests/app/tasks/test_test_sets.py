"""Test sets: the prompt is that of training, references are there, what cannot be answered is told before."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pedyra.app.models.base import load_tokenizer
from pedyra.app.recipe import check_recipe
from pedyra.app.recipe_sections import DataSection, GenerateSection, ModelSection
from pedyra.app.tasks import causal_lm, test_sets
from pedyra.app.tasks.generation import Sample
from pedyra.app.tasks.test_sets import TestSet, check_scorer, load_test_sets, score
from pedyra.app.tasks.toy import toy

ROWS = toy()[:6]
TEMPLATE: dict[str, Any] = {"template": "{document}\nsummary: ", "completion": "summary"}


def load(data: dict[str, Any], generate: dict[str, Any], model: str = "tiny-llama", rows: Any = None) -> Any:
    section = DataSection(**{"source": "toy", "kind": "causal_lm", **data})
    sections = {name: GenerateSection(**keys) for name, keys in generate.items()}
    return load_test_sets(sections, section, load_tokenizer(ModelSection(name=model)), rows or ROWS, seed=0)


def decoded(test_set: TestSet, model: str = "tiny-llama") -> list[Any]:
    tokenizer = load_tokenizer(ModelSection(name=model))
    return [tokenizer.decode(ids) for ids in test_set.prompts]


def file_of(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("data", [TEMPLATE, {"prompt": "prompt", "completion": "completion"}, {"messages": "messages"}])
def test_held_out_rows_are_asked_as_they_would_be_trained_on(data: dict[str, Any]):
    (found,) = load(data, {"mine": {}})
    section = DataSection(source="toy", kind="causal_lm", **data)
    trained = causal_lm.encode(ROWS, section, load_tokenizer(ModelSection(name="tiny-llama")), "training")
    for prompt, row, reference in zip(found.prompts, trained, found.references, strict=True):
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][: len(prompt) + 1] == [-100] * len(prompt) + [row["input_ids"][len(prompt)]]
        answer = load_tokenizer(ModelSection(name="tiny-llama")).decode(row["input_ids"][len(prompt) :])
        assert answer.startswith(reference)  # type: ignore[union-attr]
    assert found.own and found.settings.score == "exact"


THINKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|a|><think></think>{{ m.content or m.tool_calls[0] }}<|end|>"
    "{% else %}<|u|>{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)
"""As Qwen3's: an empty thought is a part of the answer, and the turn's end is no end token of the base model."""


def test_the_right_answer_of_a_chat_is_what_its_template_makes_of_it():
    tokenizer: Any = load_tokenizer(ModelSection(name="tiny-llama"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|u|>", "<|a|>", "<|end|>"]})
    asked = {"role": "user", "content": "is it good?"}
    answers = [{"content": "yes"}, {"content": None, "tool_calls": ["look(it)"]}]
    rows = [{"m": [asked, {"role": "assistant", **answer}]} for answer in answers]
    section = DataSection(source="toy", kind="causal_lm", messages="m", chat_template=THINKS)
    (found,) = load_test_sets({"mine": GenerateSection()}, section, tokenizer, rows, seed=0)
    assert found.references == ["<think></think>yes", "<think></think>look(it)"]
    assert tokenizer.convert_ids_to_tokens(found.ends) == ["<|end|>"]
    prompts = DataSection(source="toy", kind="causal_lm", prompt="p", completion="c")
    (plain,) = load_test_sets({"mine": GenerateSection()}, prompts, tokenizer, [{"p": "a", "c": "b"}], seed=0)
    assert plain.ends == []


def test_an_encoder_decoder_has_rouge_of_its_held_out_rows_without_asking():
    data = {"kind": "seq2seq", "prompt": "document", "completion": "summary", "max_length": 6, "max_target_length": 9}
    (found,) = load(data, {}, "tiny-bart")
    assert (found.settings.score, found.settings.beams, found.settings.max_new_tokens) == ("rouge", 4, 9)
    assert found.references == [row["summary"] for row in ROWS]
    assert all(len(prompt) == 6 and prompt[-1] == 6 for prompt in found.prompts)  # cut, and closed by </s>
    assert load(TEMPLATE, {}) == []


def test_a_known_set_takes_the_template_of_training(tmp_path: Path):
    rows = [{"question": "1+1?", "answer": "two\n#### 2"}, {"question": "2+2?", "answer": "four\n#### 4"}]
    source = file_of(tmp_path, rows)
    trained = {"template": "Q {query} A", "completion": "response"}
    (found,) = load(trained, {"gsm8k": {"source": source}})
    assert decoded(found) == ["<s>Q 1+1? A", "<s>Q 2+2? A"]
    assert (found.settings.score, found.settings.max_new_tokens, found.own) == ("gsm8k", 512, False)
    (found,) = load({**trained, "template": "Q {query:.90} A"}, {"gsm8k": {"source": source}})
    assert decoded(found) == ["<s>Q 1+1? A", "<s>Q 2+2? A"]
    (found,) = load({**trained, "template": "Q {{query}} {query} A"}, {"gsm8k": {"source": source}})
    assert decoded(found) == ["<s>Q {query} 1+1? A", "<s>Q {query} 2+2? A"]
    (found,) = load({"messages": "messages"}, {"gsm8k": {"source": source, "rows": 1}})
    assert decoded(found)[0].startswith("<s>user\nQuestion: ") and decoded(found)[0].endswith("<s>assistant\n")
    (found,) = load(trained, {"gsm8k": {"source": source, "max_new_tokens": 5}})
    assert found.settings.max_new_tokens == 5


@pytest.mark.parametrize(
    ("generate", "told"),
    [
        (
            {"a": {}, "b": {}},
            "generate: a and b both mean the run's held-out rows",
        ),
        ({"mine": {"score": "code"}}, "generate.mine has the score code, and held-out rows have no tests to run"),
        ({"mine": {"source": "FILE"}}, "generate.mine has a source, .*gsm8k, math, .* remove source"),
        ({"gsm8k": {"source": "FILE"}}, r"has no column 'question' \(row 1\); its columns are q, a"),
        ({"gsm8k": {"source": "none.jsonl"}}, "generate.gsm8k.source 'none.jsonl' does not exist"),
        ({"mine": {"score": "gsm8k"}}, "the reference .* holds no number"),
    ],
)
def test_what_cannot_be_asked_is_told(tmp_path: Path, generate: dict[str, Any], told: str):
    source = file_of(tmp_path, [{"q": "x", "a": "y"}])
    named = {name: {k: source if v == "FILE" else v for k, v in keys.items()} for name, keys in generate.items()}
    with pytest.raises(ValueError, match=told):
        load(TEMPLATE, named)


@pytest.mark.parametrize(("score", "package"), [("rouge", "rouge_score"), ("math", "math_verify")])
def test_a_scorer_that_is_not_installed_is_told(score: str, package: str, monkeypatch: pytest.MonkeyPatch):
    for name in [each for each in sys.modules if each.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'; run in a checkout: pip install "\.\[tasks\]"'):
        check_scorer(score)


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"stop": ["x", ""]}, "should have at least 1 character"),
        ({"beam": 2}, "unknown key 'generate.s.beam'; did you mean 'generate.s.beams'?"),
        ({"rows": 0}, "generate.s.rows is 0: Input should be greater than or equal to 1"),
    ],
)
def test_a_mistake_in_the_section_is_one_line(section: dict[str, Any], told: str):
    data = {"source": "toy", "kind": "causal_lm", **TEMPLATE}
    content = {"name": "x", "model": {"name": "tiny-llama"}, "data": data, "generate": {"s": section}}
    with pytest.raises(ValueError) as error:
        check_recipe(content, "x.yaml")
    assert told in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"lora.r is 0: .* \(and mistakes in 1 more keys\)"):
        check_recipe({**content, "lora": {"r": 0}, "generate": {"s": {"beam": 2}}}, "x.yaml")
    data = {"source": "toy"}
    with pytest.raises(ValueError, match="generate is for data.kind causal_lm and seq2seq, not classification"):
        check_recipe({**content, "data": data, "generate": {"s": {}}}, "x.yaml")


def written(*texts: str, finished: bool = True) -> list[Sample]:
    return [Sample(row=row, text=text, finished=finished, tokens=1) for row, text in enumerate(texts)]


def of(score_name: str, references: list[str], *, own: bool = False, **settings: Any) -> TestSet:
    section = GenerateSection(score=score_name, max_new_tokens=4, **settings)  # type: ignore[arg-type]
    return TestSet(
        name="s",
        prompts=[[1]] * len(references),
        settings=section,
        references=references,
        problems=[],
        own=own,
        ends=[],
    )


def test_equal_texts_are_counted():
    answers = [*written(" a  b", "a c"), *written("x", finished=False)]
    metrics, notes = score(of("exact", ["a b", "a b", "x"]), answers)
    assert metrics == {"s": 2 / 3, "s_unfinished": 1.0}
    assert notes == ["1 of 3 texts did not end within 4 tokens"]
    assert score(of("exact", ["a b"], own=True), written("a b"))[0] == {"exact_match": 1.0, "unfinished": 0.0}


def test_rouge_has_the_name_of_its_set_unless_the_rows_are_the_runs_own():
    scores, _ = score(of("rouge", ["a b"]), written("a b"))
    assert scores == {**{f"s_rouge{n}": 100.0 for n in (1, 2, "L", "Lsum")}, "s_unfinished": 0.0}
    assert score(of("rouge", ["a b"], own=True), written("b"))[0]["rouge1"] == pytest.approx(200 / 3)


def test_references_that_rouge_cannot_read_are_told():
    metrics, notes = score(of("rouge", ["слово", "a b"]), written("слово", "a b"))
    assert metrics["s_rouge1"] == 50.0
    assert notes == ["1 of 2 references have no letter from a to z: ROUGE reads no others"]


def test_mathematics_is_judged_by_its_answer_and_what_has_none_is_counted_and_shown():
    test_set = of("gsm8k", ["so 4\n#### 4", "#### 1,200", "#### 7", "#### 7"])
    metrics, notes = score(test_set, written("#### 4", "The answer is: 1200.", "seven", "#### 8"))
    assert metrics == {"s": 2 / 4, "s_strict_match": 1 / 4, "s_unparsable": 1.0, "s_unfinished": 0.0}
    assert notes == ["no answer was found in the text of row 3: 'seven'"]
    latex = of("math", [r"thus \boxed{\frac12}", r"\boxed{7}"])
    assert score(latex, written(r"is \boxed{0.5}", r"\boxed{8}"))[0]["s"] == 0.5


ADD = {
    "task_id": "T/0",
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}


def test_code_is_asked_as_it_stands_and_judged_by_its_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = file_of(tmp_path, [ADD, {**ADD, "task_id": "T/1"}])
    (found,) = load(TEMPLATE | {"template": "{document} {summary}"}, {"humaneval": {"source": source}})
    assert decoded(found) == ["<s>def add(a, b):\n"] * 2 and "\ndef " in (found.settings.stop or [])
    (instructed,) = load(TEMPLATE, {"humaneval": {"source": source}})
    asked = "<s>Complete the function.\n\ndef add(a, b):\n\nsummary: \ndef add(a, b):\n"
    assert decoded(instructed)[0] == asked and "\ndef " in (instructed.settings.stop or [])

    statuses = {"    return a + b": "passed", "    return a": "failed", "nothing": "unparsable"}

    def check_all(problems: Any, programs: Any, sandbox: Any) -> Any:
        return [statuses[text] for text in programs]

    monkeypatch.setattr(test_sets, "check_all", check_all)
    monkeypatch.setattr(test_sets, "extract", lambda text, problem: text)
    judged = replace(found, problems=found.problems * 2)
    good, bad, none = statuses
    metrics, notes = score(judged, written(good, bad, bad, none), sandbox=None)
    assert metrics == {"humaneval": 0.25, "humaneval_unparsable": 1.0, "humaneval_unfinished": 0.0}
    assert notes == ["2 failed, 1 passed, 1 unparsable"]

"""SQuAD v2: spans survive tokenising, the best span of all parts is the answer, scores are the official script's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pedyra.app.models.base import load_tokenizer
from pedyra.app.recipe_sections import DataSection, ModelSection
from pedyra.app.tasks import question_answering
from pedyra.app.tasks.question_answering import ContextPart, answers_of, encode, normalise, squad_scores, token_f1

CONTEXT = "the plot is good. the cast is dull. the score is warm. the film is cold. the scene is fine."


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(ModelSection(name="tiny-bert"))


def section(**changes: Any) -> DataSection:
    return DataSection(source="toy", kind="question_answering", **{"max_length": 24, "doc_stride": 6, **changes})


def asked(answer: str, context: str = CONTEXT, **changes: Any) -> dict[str, Any]:
    found = {"text": [answer], "answer_start": [context.index(answer)]} if answer else {"text": [], "answer_start": []}
    return {"question": "what is it?", "context": context, "answers": found, **changes}


@pytest.mark.parametrize("answer", ["good", "the score is warm", "plot is", "fine.", "ast"])
def test_the_labels_of_every_part_that_holds_the_answer_are_its_tokens(tokenizer: Any, answer: str):
    row = asked(answer)
    features, parts = encode([row], section(), tokenizer, "training")
    assert len(features) > 2 and max(len(feature["input_ids"]) for feature in features) == 24
    found = 0
    for feature, part in zip(features, parts, strict=True):
        start, end = feature["start_positions"], feature["end_positions"]
        whole = "".join(CONTEXT[slice(*span)] for span in part.spans if span)
        if start == end == part.no_answer:
            assert answer not in whole
        else:
            opens, closes = part.spans[start], part.spans[end]
            assert opens and closes
            assert answer in CONTEXT[opens[0] : closes[1]] and opens[0] <= row["answers"]["answer_start"][0]
            found += 1
    assert found


def test_a_question_without_an_answer_has_the_token_for_none(tokenizer: Any):
    features, parts = encode([asked("")], section(), tokenizer, "training")
    assert {(f["start_positions"], f["end_positions"]) for f in features} == {(0, 0)}  # [CLS] comes first
    assert all(part.no_answer == 0 and part.row == 0 for part in parts)


PARTS = [  # tokens: none, question, four of the context
    ContextPart(row=0, no_answer=0, spans=[None, None, (0, 3), (4, 8), (9, 11), (12, 16)]),
    ContextPart(row=0, no_answer=0, spans=[None, None, (9, 11), (12, 16), (18, 21), None]),
    ContextPart(row=1, no_answer=0, spans=[None, None, (0, 3), (4, 8), None, None]),
]


def scores(*places: tuple[int, int, float]) -> np.ndarray:
    found = np.zeros((3, 6))
    for part, token, value in places:
        found[part, token] = value
    return found


def answer(start: np.ndarray, end: np.ndarray) -> list[str]:
    return answers_of(start, end, PARTS, [CONTEXT, CONTEXT])


def test_the_best_span_of_all_parts_is_the_answer():
    # Row 0: "good" has 3 + 3 in its first part and 4 + 5 in its second. Row 1: 2 + 2 for "plot".
    start = scores((0, 5, 3.0), (1, 3, 4.0), (2, 3, 2.0))
    end = scores((0, 5, 3.0), (1, 3, 5.0), (1, 2, 9.0), (2, 3, 2.0))  # 4 + 9 would end before it starts
    assert answer(start, end) == [CONTEXT[12:16], CONTEXT[4:8]]
    assert answer(start, scores((0, 5, 7.0), (2, 3, 2.0))) == [CONTEXT[12:16], CONTEXT[4:8]]


def test_no_answer_is_given_where_its_score_wins():
    # The score of none is the least of all parts: 5 + 0 in part 0, 1 + 0 in part 1; the best span of row 0 has 2 + 0.
    start = scores((0, 0, 5.0), (1, 0, 1.0), (1, 2, 2.0), (2, 0, 3.0), (2, 2, 1.0))
    end = scores((2, 3, 1.0))
    assert answer(start, end) == ["is", ""]  # row 1: 3 for none against 1 + 1
    assert answer(start, scores((2, 3, 2.0))) == ["is", "the plot"]  # 3 does not win against 1 + 2


def test_an_answer_is_no_longer_than_allowed(monkeypatch: pytest.MonkeyPatch):
    start, end = scores((0, 2, 5.0)), scores((0, 5, 5.0), (0, 4, 4.0))
    assert answer(start, end)[0] == "the plot is good"
    monkeypatch.setattr(question_answering, "LONGEST", 3)
    assert answer(start, end)[0] == "the plot is"


def test_texts_are_compared_without_case_articles_punctuation_and_spaces():
    assert normalise("The  Norman's, an  island!") == "normans island"
    assert normalise("a") == ""
    # Two of three given words, two of four right ones: 2 * 2/3 * 2/4 / (2/3 + 2/4).
    assert token_f1("tall red brick house", "the red house fell") == pytest.approx(4 / 7)
    assert (token_f1("", ""), token_f1("", "x"), token_f1("x", "y")) == (1.0, 0.0, 0.0)


def test_scores_are_those_of_the_official_script_by_hand():
    texts = ["Denmark", "the tenth century", "", "Rollo", "", "the"]
    references = [["denmark", "Denmark, Iceland"], ["10th century", "in the 10th century"], ["France"], [], [], ["a"]]
    # exact 1, 0, 0, 0, 1, 1 (an answer of nothing but an article counts as none); f1 1, 1/2, 0, 0, 1, 1.
    assert squad_scores(texts, references) == pytest.approx(
        {
            **{"exact": 100 * 3 / 6, "f1": 100 * 3.5 / 6, "total": 6},
            **{"HasAns_exact": 100 * 2 / 4, "HasAns_f1": 100 * 2.5 / 4, "HasAns_total": 4},
            **{"NoAns_exact": 50.0, "NoAns_f1": 50.0, "NoAns_total": 2},
        }
    )


@pytest.mark.parametrize(
    ("row", "told"),
    [
        *(
            ({**asked(""), **wrong}, "row 1 has .* in column 'answers', for .*; answers are {text: ")
            for wrong in (
                {"answers": None},
                {"answers": {"text": ["x"], "answer_start": []}},
                {"answers": {"text": ["plot"], "answer_start": [5]}},
                {"answers": {"text": ["plot"], "answer_start": [-len(CONTEXT) + 4]}},
                {"context": 5},
            )
        ),
        (asked("", question="what " * 20), "leaves no room for parts that overlap by data.doc_stride 6"),
    ],
)
def test_rows_that_are_no_questions_are_told(tokenizer: Any, row: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        encode([row], section(), tokenizer, "training")

"""Answers found in written mathematics, and which of them are one value."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest

from pedyra.app.tasks import math


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### -5", "-5"),
        ("#### $3.50", "3.50"),
        ("#### \u22125", "-5"),  # the sign of typeset mathematics
        ("#### 1 000", "1000"),
        ("#### 1\u202f234\u202f567 in 2 years", "1234567"),
        ("Answer: 3 + 4 = 7", "7"),
        ("Answer: 3 + 4 = 7. It took 2 days.", "7"),
        ("The answer is 3 hours and 20 minutes = 200 minutes", "200"),
        ("#### 18 (=9*2)", "18"),
        ("The answer is: 2 - 7 = -5", "-5"),
        (r"\boxed{x = 12}", "12"),
        ("6 x 7 = 42. The answer is: 42", "42"),  # MetaMathQA
        ("The answer is $1,200. It took 3 days.", "1200"),
        ("So the final answer is \\boxed{72}.", "72"),
        ("There are \\boxed{10{,}000} of them, counted twice in 3 days", "10000"),
        ("First the answer is 3. No, the answer is 4.", "4"),
        ("They ate 5 and then 7 apples, 12 in all.", "12"),
        ("It costs .5 dollars", ".5"),
        ("#### none, but 8 are left", "8"),
        ("#### 42\n\n### Instruction:\nWhat is 3 + 4 = 7", "42"),  # a model that goes on
        ("####\n42", "42"),
        # A heading of Markdown is no answer.
        ("#### Step 1: eggs\n16 - 3 - 4 = 9\n#### Step 2: money\n9 * 2. The answer is 18.", "18"),
        ("#### Step 2: the total\nso it is \\boxed{42}", "42"),
        ("#### 42\n#### Check of all 3 steps", "42"),
        ("#### **18** eggs in 3 days", "18"),
        ("#### 1. Day\n15\n#### 2. Total\n30\nThe answer is: 30", "30"),
        ("#### 1. Day\n15\n#### 2) Total\n\\boxed{30}", "30"),
        ("#### 18. She makes that in 2 days", "18"),  # with nothing else to be the answer
        # The number of a sentence is what it comes to.
        ("the answer is the total of 3 days, which is \\boxed{30}", "30"),
        ("The answer is: In 2 hours she makes $30.", "30"),
        ("The answer is half of 20, which is 10", "10"),
        ("The answer is approximately 42 (rounded to 2 decimals)", "42"),
        ("The answer is \\boxed{12} of 20", "12"),
        (r"The answer is \boxed{10,\!000}", "10000"),
        (r"so $10\,000$", "10000"),
        (r"#### 1,\!234", "1234"),
        (r"it is $3\, 4$", "4"),
        # An equation after the answer does not change it.
        ("The answer is 12 (x = 4).", "12"),
        ("The answer is 12 when x = 4", "12"),
        ("The answer is 18. Check: 1 + 2 = 3", "18"),
        ("The answer is 18. 1 + 2 = 3", "18"),
        ("The answer is 18, and 1 + 2 = 3", "18"),
        ("The answer is 18 dollars per 7 days = 1 week", "18"),
        # An equation that leads to it does.
        ("The answer is 3 * 6 = 18", "18"),
        ("The answer is 9 eggs * $2 per egg = $18", "18"),
        ("The answer is 20% of 90 = 18", "18"),
        ("\\boxed{3 \\times 6 = 18}", "18"),
        ("Answer: She sold 48 / 2 = 24 clips in May. In all she sold 48 + 24 = 72 clips.", "72"),
        # Signs and separators.
        ("#### -$5", "-5"),
        ("The answer is -$5.", "-5"),
        ("The answer is - $5.", "-5"),
        ("She has -$5", "-5"),
        ("They pay $20-$25", "25"),
        ("Left:\n- 16 eggs\n- 9 eggs", "9"),
        ("It costs 1 000 dollars", "1000"),
        ("It costs 12{,}000 dollars", "12000"),
        # The first step of a reckoning is not its answer.
        ("To find the answer:\n1. Eggs per day: 16\n2. Sold: 9\nShe makes 9 * 2 = $18.", "18"),
        ("Answer: Janet's ducks lay 16 eggs per day.\nShe sells 9.\nShe makes 9 * 2 = $18.", "18"),
        ("The answer is obtained by adding 3 and 4.\nSo 7.", "7"),
        ("The answer is approximately 42.\nIt took 2 days", "42"),
        ("The answer is:\n42\n1. Day", "42"),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_the_number_of_a_gsm8k_answer(text: str, answer: str | None) -> None:
    assert math.extract_gsm8k(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{\sqrt{\frac{a}{b}}}", r"\sqrt{\frac{a}{b}}"),
        (r"thus \boxed{\text{(A) } \{1, 2\}} holds", r"\text{(A) } \{1, 2\}"),
        (r"so \boxed 5$", "5"),
        (r"\fbox{7}", "7"),
        ("Hence. The answer is: $\\frac{3}{4}$.", r"\frac{3}{4}"),
        (r"\boxed{\frac{1}{2", None),  # cut short
        (r"\boxed{}", None),
        ("no answer was found", None),
    ],
)
def test_the_answer_of_a_math_solution(text: str, answer: str | None) -> None:
    assert math.extract_boxed(text) == answer


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        (r"\dfrac{1}{2}", r"\frac12", True),
        (r"\pi/2", r"\frac\pi2", True),
        (r"\frac{x}{\pi}", r"\frac x\pi", True),
        ("seat", "east", False),
        ("xy", "yx", True),
        ("BAC", "ABC", False),  # points
        ("12_5", "12_7", False),
        ("12", "12_7", False),
        ("-221_5", "-221_3", False),
        ("A5_{12}", r"\text{A5}_{11}", False),
        ("12_{7}", "12_7", True),
        ("0.5", r"\frac{1}{2}", True),
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        ("(x+1)^2", "x^2+2x+1", True),
        (r"(-\infty, 2]", r"\left(-\infty,2\right]", True),
        (r"(-\infty, 2)", r"(-\infty, 2]", False),
        ("(1, 2)", "(2, 1)", False),
        ("Saturday", r"\text{Saturday}", True),
        (r"\text{even}", r"\text{odd}", False),
        (r"90^\circ", "90", True),
        (r"\$32{,}348", "32348", True),
        ("3, 5, 7", "7,5,3", True),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
        ("3", "4", False),
        (r"\frac{", "1", False),
    ],
)
def test_two_answers_are_one_value(answer: str, reference: str, same: bool) -> None:
    pytest.importorskip("math_verify")
    assert math.equivalent(answer, reference) is same


def test_a_tower_of_powers_ends_in_time_and_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    monkeypatch.setattr(math, "_SECONDS", 1)
    assert not math.equivalent("9^{9^{9^9}}", "3")


def test_equivalence_is_refused_where_its_time_cannot_be_bounded() -> None:
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            math.equivalent("1/2", "0.5")
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert "main thread" in str(raised[0])


def test_without_math_verify_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[tasks\]"'):
        math.equivalent("1/2", "0.5")


@pytest.mark.parametrize(
    ("grade", "text", "reference", "expected"),
    [
        (math.grade_gsm8k, "The answer is: 18.0", "9 * 2 = 18\n#### 18", "correct"),
        (math.grade_gsm8k, "#### 17", "#### 18", "wrong"),
        (math.grade_gsm8k, "eighteen", "#### 18", "unparsable"),
        (math.grade_math, r"\boxed{42 }", r"it is $\boxed{42}$", "correct"),
        (math.grade_math, r"The answer is: 42", r"\boxed{42}", "correct"),
        (math.grade_math, "it is 42", r"\boxed{42}", "unparsable"),
    ],
)
def test_a_text_without_an_answer_is_an_outcome_of_its_own(
    grade: Any, text: str, reference: str, expected: str
) -> None:
    assert grade(text, reference) == expected


@pytest.mark.parametrize(
    ("grade", "rule"), [(math.grade_gsm8k, "holds no number"), (math.grade_math, "holds no .*box")]
)
def test_a_reference_without_an_answer_is_refused(grade: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        grade("42", "see the picture")

"""Answers are found in written mathematics as lm-evaluation-harness and math-verify find them."""

from __future__ import annotations

import sys

import pytest

from pedyra.app.tasks.math import equivalent, gsm8k_reference, last_number, marked_number, parse_answer

# What gsm8k.yaml of lm-evaluation-harness extracts: strict-match takes the first number behind the mark, and
# flexible-extract the last one, from both of which commas, $ and a full stop are removed before they are compared.
GSM8K = [
    ("She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 18", "18", "18"),
    ("#### 1,234,567", "1234567", "1234567"),
    ("#### -5", "-5", "-5"),
    ("#### $3.50", None, "3.50"),
    ("6 x 7 = 42. The answer is: 42", None, "42"),  # MetaMathQA
    ("The answer is $1,200.", None, "1200"),
    ("So the final answer is \\boxed{72}.", None, "72"),
    ("#### 42\n#### Check of all 3 steps", "42", "3"),
    ("They ate 5 and then 7 apples, 12 in all.", None, "12"),
    ("I do not know.", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("text", "strict", "flexible"), GSM8K)
def test_the_two_numbers_of_a_gsm8k_answer(text: str, strict: str | None, flexible: str | None) -> None:
    assert (marked_number(text), last_number(text)) == (strict, flexible)


def test_the_reference_of_gsm8k_is_what_follows_its_mark() -> None:
    assert gsm8k_reference("16 - 3 = <<16-3=13>>13\n#### 1,300") == "1300"
    assert gsm8k_reference("42") == "42"
    with pytest.raises(ValueError, match="holds no number"):
        gsm8k_reference("see the picture")


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        (r"so $x = \boxed{\dfrac{1}{2}}$.", r"thus \boxed{\frac12}", True),
        ("Hence. The answer is: $0.5$.", r"\boxed{\frac{1}{2}}", True),
        (r"so \boxed{2\sqrt{2}}", r"\boxed{\sqrt{8}}", True),
        (r"\boxed{(x+1)^2}", r"\boxed{x^2+2x+1}", True),
        (r"\boxed{(-\infty, 2)}", r"\boxed{(-\infty, 2]}", False),
        (r"\boxed{(1, 2)}", r"\boxed{(2, 1)}", False),
        (r"\boxed{Saturday}", r"\boxed{\text{Saturday}}", True),
        (r"\boxed{\text{even}}", r"\boxed{\text{odd}}", False),
        (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", True),
        ("3", r"\boxed{4}", False),
        ("no answer was found", r"\boxed{4}", False),
    ],
)
def test_two_answers_are_one_value(text: str, reference: str, same: bool) -> None:
    pytest.importorskip("math_verify")
    assert equivalent(parse_answer(text), parse_answer(reference)) is same


def test_without_math_verify_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[tasks\]"'):
        parse_answer("0.5")

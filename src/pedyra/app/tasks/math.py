"""Written mathematics is scored as others do: GSM8K by the rules of lm-evaluation-harness, MATH by math-verify."""

from __future__ import annotations

import re
from typing import Any

from pedyra.app.packaged import import_extra
from pedyra.errors import UserError

_MARKED = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_IGNORED = (",", r"\$", "(?s).*#### ", r"\.$")


def marked_number(text: str) -> str | None:
    """Find the number after "#### ", the harness's "strict match"; None if there is none."""
    match = _MARKED.search(text)
    return match and _plain(match[1])


def last_number(text: str) -> str | None:
    """Find the last number of the text, the harness's "flexible extract"; None if there is none."""
    numbers = _NUMBER.findall(text)
    return _plain(numbers[-1]) if numbers else None


def gsm8k_reference(answer: str) -> str:
    """Return the number of GSM8K's `answer` column, which stands after "#### "."""
    reference = _plain(answer)
    if not re.search(r"\d", reference):
        raise UserError(f"the reference {answer[-80:]!r} holds no number; GSM8K's answers end in '#### number'")
    return reference


def _plain(text: str) -> str:
    for pattern in _IGNORED:
        text = re.sub(pattern, "", text)
    return text.strip()


def parse_answer(text: str) -> list[Any]:
    r"""Read the answer of a text in LaTeX: what its \boxed{} holds, else what it states; empty if there is none.

    math-verify bounds its time by a signal, so only the main thread may call this and `equivalent`.
    """
    return math_verify().parse(text)


def equivalent(answer: list[Any], reference: list[Any]) -> bool:
    r"""Return whether two parsed answers have one value: 1/2, 0.5 and \frac{1}{2} do, [0, 1) and (0, 1) do not."""
    return bool(math_verify().verify(reference, answer))


def math_verify() -> Any:
    return import_extra("math_verify", "the equivalence of answers needs math-verify", "tasks")

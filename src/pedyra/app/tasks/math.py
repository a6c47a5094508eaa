"""Scoring of written mathematics: the answer in a model's text, and whether it is the reference's.

GSM8K's answers are numbers; MATH's are LaTeX, compared by `math-verify` (the extra "tasks").
"""

from __future__ import annotations

import re
import threading
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from pedyra.app.packaged import needed

Grade = Literal["correct", "wrong", "unparsable"]
"""unparsable: no answer was found in the text."""

_SECONDS = 10
"""For one parse or one comparison; sympy may think for ever about towers of powers. The first parse takes a second."""
_LONGEST = 500
"""Signs of an answer that is compared by its value; MATH's longest has 159."""
_WORD = re.compile(r"[A-Za-z]{4,}|[A-Z]{2,}")
"""A reference whose letters are no factors: east, or the points ABC."""
_WITH_BASE = re.compile(r"-?[\dA-Z.]+_\{?\d+\}?")
"""A number and its base, 12_7, which math-verify reads without the base."""
_FRACTION = re.compile(r"\\[dt]?frac\s*(\\[a-zA-Z]+|\w)\s*(\\[a-zA-Z]+|\w)")
"""Without braces, which math-verify reads for digits alone: \\frac\\pi2."""
_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_GROUPED = re.compile(r"\b\d{1,3}(?:[ \u00a0\u202f]\d{3})+\b")
"""1 000, with a space, a no-break one or a narrow one."""
_RESULT = re.compile(rf".*=\s*\$?({_NUMBER.pattern})(?!\s*[-+*/^\u00d7\u00f7\d])", re.DOTALL)
"""What comes after the last equals sign that gives a value: 7 of "3 + 4 = 7", and nothing of "18 (=9*2)"."""
_RECKONED = re.compile(
    r"(?<!,)(?:(?!\b[b-z]\b)[^\d.,:;(])*?"
    r"(?:[-+*/^x=\u00d7\u00f7]|\b(?:and|of|by|times|plus|minus|cdot|div)\b)[\s$({\\]*-?\.?\d",
    re.IGNORECASE,
)
"""What follows a number that is reckoned with, up to the next one: " eggs * $2", " hours and 20", but not " per 7"."""
_CONCLUDED = re.compile(
    rf".*\b(?:is|are|be|makes?|equals?|gives?|leaves?|gets?|earns?|has|have|needs?|pays?|costs?|spends?|saves?)\s+"
    rf"\$?({_NUMBER.pattern})",
    re.DOTALL,
)
"""What a sentence comes to that begins with other numbers: 30 of "In 2 hours she makes $30"."""
_THIN_SPACE = re.compile(r"(?<=\d),?\\[!,;: ](?=\d{3})")
"""LaTeX between groups of digits: 10,\\!000 and 10\\,000."""
_NUMBERED = re.compile(r"\W*\d+[.)]\s+[^\W\d]")
"""What may be a heading of Markdown with its number: "#### 2. The total"."""
_MARKED = re.compile(r"####([^\w#]*\d.*)")
"""The line after "####", where no word stands before its number: headings of Markdown begin with the same sign."""
_STATEMENT = re.compile(r"answer\s*(?:is|:|=)+\s*:?", re.IGNORECASE)
"""MetaMathQA ends in "The answer is: 42", other training sets in "the answer is 42" or "Answer: 42"."""
_BEGINS_LIST = re.compile(rf"{_STATEMENT.pattern}\s*\n{_NUMBERED.pattern}", re.IGNORECASE)


def extract_gsm8k(text: str) -> str | None:
    r"""The number that the text gives as its answer, without separators and units; None if it holds no number.

    The last "#### 42", else the last "The answer is: 42", else the last \boxed{42}, else the last number.
    """
    text = _THIN_SPACE.sub(",", text.replace("\\$", "").replace("{,}", ",").replace("\u2212", "-"))
    text = re.sub(r"(?<!\w)-\$", "-", text)
    text = _GROUPED.sub(lambda grouped: re.sub(r"\s", "", grouped.group()), text)
    every, box = _MARKED.findall(text), _last_box(text)
    marked = [place for place in every if not _NUMBERED.match(place)]
    # After "To find the answer:" the next line may begin a numbered list of the steps.
    after = [found for found in _STATEMENT.finditer(text) if not _BEGINS_LIST.match(text, found.start())]
    stated, _, later = text[after[-1].end() :].partition("\n") if after else ("", "", "")
    if not (marked or after or box):
        marked = every
    for place, goes_on in ((marked[-1] if marked else "", False), (stated, _NUMBER.search(later)), (box or "", False)):
        if number := _number_stated(re.sub(r"- ?\$?", "-", place), reckons_on=bool(goes_on)):
            return number.replace(",", "")
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def _number_stated(place: str, *, reckons_on: bool) -> str | None:
    """That of the last box; else the number at the beginning, if it is not reckoned with; else the last result or what
    a sentence with other numbers comes to; else the first number.

    None for the first sentence of a reckoning ("Janet's ducks lay 16 eggs") that goes on with other numbers
    (`reckons_on`).
    """
    place = _last_box(place) or place
    first = _NUMBER.search(place)
    if first is None:
        return None
    begins = not re.search(r"\w", place[: first.start()])
    if begins and not _RECKONED.match(place, first.end()):
        return first.group()
    result = _RESULT.match(place) or (None if begins else _CONCLUDED.match(place))
    if result:
        return result.group(1)
    return None if reckons_on and len(re.findall(r"\w+", place[: first.start()])) > 2 else first.group()


def extract_boxed(text: str) -> str | None:
    r"""The answer of a MATH solution: what the last \boxed{} or \fbox{} holds, braces nested to any depth.

    Without a box: the rest of the line after the last "The answer is:". None if there is neither.
    """
    box = _last_box(text)
    if box is not None:
        return box
    stated = [line.rstrip(".").strip().strip("$").strip() for line in _stated(text)]
    return next((line for line in reversed(stated) if line), None)


def _stated(text: str) -> list[str]:
    """What follows each "The answer is:", to the end of its line."""
    return [text[found.end() :].partition("\n")[0].strip() for found in _STATEMENT.finditer(text)]


def _last_box(text: str) -> str | None:
    for found in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*(\{|[^\s{$]+)", text))):
        if found.group(1) != "{":  # \boxed 5
            return found.group(1)
        depth, start = 1, found.end()
        for at in range(start, len(text)):
            # \{ and \} are signs, not braces
            if text[at] in "{}" and text[at - 1] != "\\":
                depth += 1 if text[at] == "{" else -1
            if depth == 0:
                return text[start:at].strip() or None
    return None


def equivalent(answer: str, reference: str) -> bool:
    r"""Whether two answers, in LaTeX or plain, are one value: 1/2, 0.5 and \frac{1}{2} are, [0, 1) and (0, 1) not.

    Bounded in time (a comparison that takes longer is False) by a signal, so only the main thread may call.
    Raises ImportError without math-verify, RuntimeError in another thread.
    """
    if _plain(answer) == _plain(reference):
        return True
    if len(answer) > _LONGEST or _WORD.fullmatch(_plain(reference)):
        return False
    if _WITH_BASE.fullmatch(_plain(reference)):
        return _unbraced(answer) == _unbraced(reference)
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("math.equivalent bounds its time by a signal; call it in the main thread")
    by_value = math_verify()
    sides = (_FRACTION.sub(r"\\frac{\1}{\2}", side) for side in (reference, answer))
    right, given = (by_value.parse(f"${side}$", parsing_timeout=_SECONDS) for side in sides)
    return bool(right and given and by_value.verify(right, given, timeout_seconds=_SECONDS))


def math_verify() -> Any:
    """The package that compares answers. Raises ImportError with the line that installs it."""
    return needed("math_verify", "the equivalence of answers needs math-verify", "tasks")


def _plain(text: str) -> str:
    """The same text for the same answer but for its spelling: spaces, $, \\left, \\dfrac, \\text."""
    text = re.sub(r"\\(?:left|right|!|,|;|:|quad)(?![a-zA-Z])|\\?\$|\s|~", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    return re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", text).rstrip(".")


def _unbraced(text: str) -> str:
    return re.sub(r"[{},]|\\", "", _plain(text))


def gsm8k_reference(answer: str) -> str:
    """The number of GSM8K's `answer` column. Raises ValueError if it holds none."""
    reference = extract_gsm8k(answer)
    if reference is None:
        raise ValueError(f"the reference {answer[-80:]!r} holds no number; GSM8K's answers end in '#### number'")
    return reference


def math_reference(solution: str) -> str:
    r"""The answer of MATH's `solution` column. Raises ValueError if it holds no \boxed{}."""
    reference = extract_boxed(solution)
    if reference is None:
        raise ValueError(f"the reference {solution[-80:]!r} holds no \\boxed{{}}; MATH's solutions do")
    return reference


def grade_gsm8k(text: str, answer: str) -> Grade:
    """A model's text against GSM8K's `answer` column, which ends in "#### number". Equal as numbers: 18 is 18.0.

    Raises ValueError if the reference holds no number.
    """
    reference = gsm8k_reference(answer)
    found = extract_gsm8k(text)
    if found is None:
        return "unparsable"
    try:
        return "correct" if Decimal(found) == Decimal(reference) else "wrong"
    except InvalidOperation:  # digits that are no decimal ones
        return "unparsable"


def grade_math(text: str, solution: str) -> Grade:
    r"""A model's text against MATH's `solution` column, which holds \boxed{answer}.

    Raises ValueError if the reference holds no box.
    """
    reference = math_reference(solution)
    found = extract_boxed(text)
    if found is None:
        return "unparsable"
    return "correct" if equivalent(found, reference) else "wrong"

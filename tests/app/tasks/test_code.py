"""Programs out of text, problems out of files, and verdicts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pedyra.app.tasks.code import CodeProblem, check_all, extract, problems_of
from pedyra.app.tasks.sandbox import Sandbox
from pedyra.app.tasks.sources import read_test_rows
from pedyra.errors import UserError


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox()
    except UserError as refusal:
        pytest.skip(str(refusal))


# --------------------------------------------------------------------------- the files

HUMAN_EVAL = {
    "task_id": "HumanEval/38",
    "prompt": "import math\n\ndef shift(x):\n    return x + 1\n\ndef back(x):\n    '''the inverse of shift'''\n",
    "entry_point": "back",
    "canonical_solution": "    return x - 1\n",
    "test": "def check(candidate):\n    for x in range(3):\n        assert candidate(shift(x)) == x\n",
}
MBPP = {
    "task_id": 367,
    "text": "Write a function to count a tree's nodes.",
    "code": "class Node:\r\n    def __init__(self, v):\r\n        self.left = None\r\n"
    "def count(t):\r\n    return 0 if t is None else 1 + count(t.left)\r\n",
    "test_setup_code": "import math\r\nroot = Node(1)\r\nroot.left = Node(2)",
    "test_list": ["assert count(root) == 2", "assert math.isclose(count(root.left), 1)"],
    "challenge_test_list": [],
}
MBPP_PLUS = {
    "task_id": 98,
    "code": "\ndef product(numbers):\n    return math.prod(numbers) / len(numbers)\nimport math\n",
    "prompt": "Write a function to divide the product of all numbers by how many there are.",
    "source_file": "Benchmark Questions Verification V2.ipynb",
    "test_imports": ["import math", "from math import isclose"],
    "test_list": ["assert isclose(product((8, 2)), 8.0)", "assert isclose(product((-10, -20)), 100.0)"],
    "test": """\
from math import inf
import numpy as np

def is_floats(x) -> bool:
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    return isinstance(x, np.ndarray) and x.dtype == np.float64

def assertion(out, exp, atol):
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if out != exp and atol != 0:
        np.testing.assert_allclose(out, exp, atol=atol)
    else:
        assert out == exp

inputs = [[(8, 2)], [(-10, -20)], [[3, 1, 0.1]], [[inf, 1]]]
results = [8.0, 100.0, 0.1, inf]
for i, (inp, exp) in enumerate(zip(inputs, results)):
    assertion(product(*inp), exp, 0)
""",
}
RELEASED = {**HUMAN_EVAL, "base_input": [[1]], "plus_input": [[2]], "atol": 0}
"""EvalPlus's release file has HumanEval's own test beside all the inputs."""
WRONG = {
    "back": "def back(x):\n    return x\n",
    "count": "def count(t):\n    return 2\nclass Node:\n    def __init__(self, v): pass\n",
    "product": "def product(numbers):\n    return numbers[0] * numbers[1] / 2\n",  # right by test_list
}


def solution(row: dict[str, Any]) -> str:
    """The reference of a row, as a whole program."""
    return row["code"].replace("\r\n", "\n") if "code" in row else row["prompt"] + row["canonical_solution"]


@pytest.mark.parametrize("row", [HUMAN_EVAL, MBPP, MBPP_PLUS])
def test_the_reference_of_each_format_passes_and_a_wrong_one_fails(sandbox: Sandbox, row: dict[str, Any]) -> None:
    (problem,) = problems_of([row], "x")
    programs = [extract(text, problem) for text in (solution(row), WRONG[problem.entry_point], "none")]
    assert check_all([problem] * 3, programs, sandbox) == ["passed", "failed", "unparsable"]


def test_mbpp_plus_is_asked_by_its_text_and_one_test() -> None:
    (problem,) = problems_of([MBPP_PLUS], "x")
    assert problem.prompt == (
        '"""\nWrite a function to divide the product of all numbers by how many there are.\n'
        'assert isclose(product((8, 2)), 8.0)\n"""\n'
    )


@pytest.mark.parametrize(
    "row",
    [
        {"question": 1},
        {"task_id": 1, "prompt": None},
        RELEASED,
        {**MBPP, "test_list": []},
        {**MBPP, "test_list": ["assert other(1)"]},
        {**MBPP, "code": "def f(:"},
    ],
)
def test_rows_that_are_no_problems_are_told_by_their_number(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^row 2 of x is no problem of HumanEval") as caught:
        problems_of([HUMAN_EVAL, row], "x")
    assert "\n" not in str(caught.value)


def test_an_import_of_the_future_comes_first() -> None:
    text = "```python\nfrom __future__ import annotations\n\ndef area(r):\n    return math.pi * r ** 2\n```"
    program = extract(text, CONTINUED)
    compile(program, "program", "exec")
    assert program.splitlines()[:2] == ["from __future__ import annotations", "import math"]


@pytest.mark.skipif("PEDYRA_DATA" not in os.environ, reason="PEDYRA_DATA names no folder with the published sets")
@pytest.mark.parametrize(("name", "count"), [("humaneval", 164), ("mbpp", 500)])
def test_every_published_reference_passes(name: str, count: int) -> None:
    rows = read_test_rows(str(Path(os.environ["PEDYRA_DATA"]) / name / "test.jsonl.gz"), None, "test", None, "x")
    problems = problems_of(rows, name)
    programs = [extract(solution(row), problem) for row, problem in zip(rows, problems, strict=True)]
    assert check_all(problems, programs, Sandbox()) == ["passed"] * count


# --------------------------------------------------------------------------- extraction

CONTINUED = CodeProblem(
    prompt="import math\n\ndef area(r):\n    '''of a circle'''\n",
    entry_point="area",
    stop=("\ndef ", "\nprint("),
    tests="",
)
BODY = 'import math\n\ndef area(r):\n    """of a circle"""\n    return math.pi * r ** 2'
CONSTANT = "import math\nPI = 3\n\ndef area(r):\n    return PI * r ** 2"
WHOLE = "import math\n\ndef area(r):\n    return math.pi * r ** 2"
HEADED = "import math\n\ndef area(r):\n    pass\n\ndef area(r):\n    return math.pi * r ** 2"
IMPORTED = "import math\n" + WHOLE
ALONE = "import math\n\ndef area(r):\n    k = math.pi\n    return k * r ** 2"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("    return math.pi * r ** 2\n", BODY),
        ("    return math.pi * r ** 2\n\ndef other():\n    pass", BODY),
        ("    return math.pi * r ** 2\nprint(area(1))", BODY),
        ("    return math.pi * r ** 2\n\nThis works because", BODY),
        ("    return math.pi * r ** 2\n    x = (", BODY),
        ("Sure!\n```python\ndef area(r):\n    return math.pi * r ** 2\n```\nIt uses", WHOLE),
        ("```\r\ndef area(r):\r\n    return math.pi * r ** 2\r\n```", WHOLE),
        ("```py\ndef area(r):\n    return math.pi * r ** 2", WHOLE),  # the fence is not closed
        ("```\npip install x\n```\n```python\ndef area(r):\n    return math.pi * r ** 2\nprint(area(2))\n```", WHOLE),
        ("Here it is:\n\ndef area(r):\n    return math.pi * r ** 2\n\nassert area(1) > 3\n", WHOLE),
        ("```python\n    return math.pi * r ** 2\n```", BODY),
        ("PI = 3\n\ndef area(r):\n    return PI * r ** 2", CONSTANT),
        # As by a tokenizer that begins every text with a space.
        (" def area(r):\n    return math.pi * r ** 2", WHOLE),
        (" import math\n\ndef area(r):\n    return math.pi * r ** 2", IMPORTED),
        (" PI = 3\n\ndef area(r):\n    return PI * r ** 2", CONSTANT),
        ("```\nPI = 3\n```\nThen:\n```\ndef area(r):\n    return PI * r ** 2\n```", CONSTANT),
        ("```\ndef area(r):\n    k = math.pi\n    return k * r ** 2\n```\n```\nk = area(1)\n```", ALONE),
        ("Here it is:\n\nPI = (\n    3\n)\ndef area(r):\n    return PI * r ** 2\n\nIt uses PI.", CONSTANT),
        # Several blocks are one program, and a head alone is none.
        ("```python\nimport math\n```\nThen:\n```python\ndef area(r):\n    return math.pi * r ** 2\n```", IMPORTED),
        (
            "```\ndef area(r):\n    return math.pi * r ** 2\n```\n```\nfrom shapes import area\nprint(area(1))\n```",
            WHOLE,
        ),
        ("```\ndef area(r):\n    pass\n```\n```\ndef area(r):\n    return math.pi * r ** 2\n```", HEADED),
        ("1. So:\n   ```python\n   def area(r):\n       return math.pi * r ** 2\n   ```", WHOLE),
        ("```python3.10\ndef area(r):\n    return math.pi * r ** 2\n```", WHOLE),
        ("from the docstring above:\n\ndef area(r):\n    return math.pi * r ** 2\n", WHOLE),
        ("def area(r):\n    return math.pi * r ** 2\n\nExplanation: fine", WHOLE),
        # A block of another language is none of the program, and hides none.
        ("Run:\n```bash\npython area.py\n```\n\n```python\ndef area(r):\n    return math.pi * r ** 2\n```", WHOLE),
        ('```python title="area.py"\ndef area(r):\n    return math.pi * r ** 2\n```', WHOLE),
        ("I cannot write that.", ""),
        ("", ""),
        ("    \x00", ""),
        ("(" * 5000, ""),
        ("    return " + "+".join("1" * 5000), ""),
    ],
)
def test_the_program_in_a_text(text: str, program: str) -> None:
    assert extract(text, CONTINUED).replace("'''", '"""').replace("\n\n\n", "\n\n") == program


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("k += [1]", True),
        ("k.append(0)", False),
        ("'about the program'", False),
        ("Explanation", False),  # a word of prose, which Python reads as a name
        ("print(k)", False),
        ("input('a radius? ')", False),
        ("area(1)", False),
        ("k.append(area(1))", False),
        ("assert area(1) > 3", False),
    ],
)
def test_of_the_lines_at_the_margin_demonstrations_are_left_out(line: str, kept: bool) -> None:
    program = extract(f"```python\nimport sys\nk = []\n{line}\ndef area(r):\n    return r\n```", CONTINUED)
    before = ["import math", "import sys", "k = []"]
    after = ["def area(r):", "    return r"]
    assert program.replace("\n\n", "\n").splitlines() == [*before, *[line] * kept, *after]

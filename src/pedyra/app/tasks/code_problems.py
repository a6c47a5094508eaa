"""Programming problems are read from the Hub's data sets HumanEval, HumanEval+, MBPP and MBPP+, and files like them."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pedyra.errors import UserError

STOP = ("\nclass ", "\ndef ", "\n#", "\n@", "\nif ", "\nprint(", "\nassert ", "\nimport ", "\nfrom ", "\n```", "\n<")
"""A continuation of a function's head ends at the next thing at the margin (Chen et al. 2021, and EvalPlus)."""
STOP_WHOLE = ('\n"""', "\nassert ", "\nif __name__", "\nprint(", "\n```", "\n<")
"""A function ends here that the model writes from its head on."""


@dataclass(frozen=True, kw_only=True)
class CodeProblem:
    """It is one problem, whichever set it is of."""

    task_id: str
    prompt: str
    """A model completes this: a function's head with its docstring (HumanEval), or a docstring before it (MBPP)."""
    entry_point: str
    solution: str
    """The reference: a whole program."""
    stop: tuple[str, ...]
    """Strings that end a completion of the prompt."""
    setup: str = ""
    """Code that the tests need, and that is not the solution's."""
    tests: str = ""
    """Asserts on the entry point."""


def parse(source: str) -> ast.Module:
    """Make the syntax tree. Raises SyntaxError for all that Python does not read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (ValueError, MemoryError, RecursionError) as error:
            raise SyntaxError(str(error) or type(error).__name__) from None


def problems_of(rows: Sequence[dict[str, Any]], where: str) -> list[CodeProblem]:
    """Read the problems of rows of HumanEval(+) or MBPP(+); the columns say which.

    Raises ValueError, one line that begins with the row and `where`, for what is none.
    """
    problems = []
    for number, row in enumerate(rows, start=1):
        try:
            problems.append(_problem(row))
        except (LookupError, TypeError, AttributeError, ValueError, SyntaxError, StopIteration) as error:
            raise UserError(
                f"row {number} of {where} is no problem of HumanEval(+) or MBPP(+): it has the columns "
                f"{', '.join(row)} ({type(error).__name__} {error})"
            ) from None
    return problems


def _problem(row: dict[str, Any]) -> CodeProblem:
    if "plus_input" in row:  # its `test`, where it has one, is over the few inputs of HumanEval alone
        raise UserError("EvalPlus's release files have no tests of all inputs; its data sets on the Hub have them")
    return _mbpp(row) if "test_list" in row else _human_eval(row)


def _human_eval(row: dict[str, Any]) -> CodeProblem:
    """Read HumanEval, and the Hub's HumanEval+, whose `test` is over all inputs."""
    return CodeProblem(
        task_id=row["task_id"],
        prompt=row["prompt"],
        entry_point=row["entry_point"],
        solution=row["prompt"] + row["canonical_solution"],
        stop=STOP,
        setup=row["prompt"],  # its helper functions; the last one has no body but its docstring
        tests=f"{row['test']}\ncheck({row['entry_point']})",
    )


def _mbpp(row: dict[str, Any]) -> CodeProblem:
    """Read MBPP, and the Hub's MBPP+, whose `test` is over all inputs beside MBPP's sanitized columns."""
    tests, solution = row["test_list"], row["code"].replace("\r\n", "\n")
    defined = {node.name for node in parse(solution).body if isinstance(node, ast.FunctionDef)}
    called = [call.func.id for call in _calls(tests[0])]
    return CodeProblem(
        task_id=f"Mbpp/{row['task_id']}",
        # The form of MBPP+: the text and one test, in a docstring.
        prompt=f'"""\n{row["text"] if "text" in row else row["prompt"]}\n{tests[0]}\n"""\n',
        entry_point=next(name for name in called if name in defined),
        solution=solution,
        stop=STOP_WHOLE,
        setup="\n".join([*row.get("test_imports", ()), row.get("test_setup_code", "").replace("\r\n", "\n")]),
        tests=row.get("test") or "\n".join(tests),
    )


def _calls(source: str) -> list[Any]:
    calls = [node for node in ast.walk(parse(source)) if isinstance(node, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Name)]

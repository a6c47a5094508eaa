"""Programming problems are read from the published files of HumanEval, HumanEval+, MBPP and MBPP+."""

from __future__ import annotations

import ast
import contextlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pedyra.app.tasks import code_judge
from pedyra.errors import UserError

STOP = ("\nclass ", "\ndef ", "\n#", "\n@", "\nif ", "\nprint(", "\nassert ", "\nimport ", "\nfrom ", "\n```", "\n<")
"""A continuation of a function's head ends at the next thing at the margin (Chen et al. 2021, and EvalPlus)."""
STOP_WHOLE = ('\n"""', "\nassert ", "\nif __name__", "\nprint(", "\n```", "\n<")
"""A function ends here that the model writes from its head on."""


@dataclass(frozen=True, kw_only=True)
class CodeProblem:
    """One problem, whichever set it is of."""

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
    inputs: tuple[Any, ...] = ()
    """Argument lists, encoded; results are compared with the reference's (EvalPlus)."""
    tolerance: float = 0.0
    """Absolute, for results of `inputs`."""
    oracle: str = ""
    """It compares results of `inputs` where equality is not the rule: see `code_judge.agrees`."""


def parse(source: str) -> ast.Module:
    """Make the syntax tree. Raises SyntaxError for all that Python does not read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (ValueError, MemoryError, RecursionError) as error:
            raise SyntaxError(str(error) or type(error).__name__) from None


def problems_of(rows: Sequence[dict[str, Any]], where: str) -> list[CodeProblem]:
    """Read the problems of rows of human-eval, MBPP or EvalPlus; the columns say which.

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
    if "plus_input" in row:
        return _evalplus(row)
    return _mbpp(row) if "test_list" in row else _human_eval(row)


def _human_eval(row: dict[str, Any]) -> CodeProblem:
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
    """Read MBPP's files, and the Hub's of MBPP+, whose `test` is over all inputs beside MBPP's sanitized columns."""
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


_ORACLES = {
    "HumanEval": {"find_zero": "root"},
    "Mbpp": {
        "are_equivalent": "any",
        "sum_div": "zero",
        "surface_Area": "pyramid",
        "digit_distance_nums": "digits",
        **dict.fromkeys(("check_str", "text_match_three", "text_starta_endb"), "not_none"),
        **dict.fromkeys(("similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly"), "set"),
        **dict.fromkeys(("larg_nnum", "intersection_array", "find_dissimilar", "Diff"), "set"),
    },
}
"""The texts of these problems allow more than one result, and EvalPlus 0.3.1 judges them so."""


def _evalplus(row: dict[str, Any]) -> CodeProblem:
    """Read EvalPlus's release files: HumanEvalPlus.jsonl and MbppPlus.jsonl."""
    family, entry_point, inputs = (
        row["task_id"].split("/")[0],
        row["entry_point"],
        [*row["base_input"], *row["plus_input"]],
    )
    human_eval = family == "HumanEval"
    if not human_eval:
        inputs = _with_types(inputs, row["assertion"], entry_point)
    return CodeProblem(
        task_id=row["task_id"],
        prompt=row["prompt"],
        entry_point=entry_point,
        solution=(row["prompt"] if human_eval else "") + row["canonical_solution"],
        stop=STOP if human_eval else STOP_WHOLE,
        inputs=tuple(code_judge.encode(inputs)),
        tolerance=row["atol"],
        oracle=_ORACLES[family].get(entry_point, ""),
    )


def _with_types(inputs: list[list[Any]], assertion: str, entry_point: str) -> list[list[Any]]:
    """Give MBPP+ inputs the tuples, sets and complex numbers that JSON lost and the problem's own asserts have."""
    calls = [call for call in _calls(assertion) if call.func.id == entry_point]
    shown = [[_literal(argument) for argument in call.args] for call in calls]
    places = [[row[place] for row in shown if place < len(row)] for place in range(max(map(len, shown)))]
    return [[_like(value, examples) for value, examples in zip(row, places, strict=False)] for row in inputs]


def _literal(argument: ast.expr) -> Any:
    """Read an argument that is written out, or a product of such numbers, as in one problem of MBPP+. Rows may be
    anybody's, so nothing of them is run here. Raises ValueError for anything else."""
    if isinstance(argument, ast.BinOp) and isinstance(argument.op, ast.Mult):
        factors = [ast.literal_eval(side) for side in (argument.left, argument.right)]
        if all(isinstance(factor, int) for factor in factors):
            return math.prod(factors)
    return ast.literal_eval(argument)


def _like(value: Any, examples: list[Any], in_tuple: bool = False) -> Any:
    """Make every list in the value what the examples have at this place; tuples in tuples go on without end."""
    if isinstance(value, list):
        sequences = [example for example in examples if isinstance(example, (list, tuple, set))]
        kind = next((kind for kind in (tuple, set) if any(isinstance(e, kind) for e in sequences)), list)
        inner = [item for example in sequences for item in example]
        if kind is tuple and in_tuple and not any(isinstance(item, (list, tuple, set, dict)) for item in inner):
            inner = examples
        return kind(_like(item, inner, kind is tuple) for item in value)
    if isinstance(value, dict):
        inner = [item for example in examples if isinstance(example, dict) for item in example.values()]
        return {key: _like(item, inner) for key, item in value.items()}
    numeric = examples and all(isinstance(example, (int, float, complex)) for example in examples)
    if isinstance(value, str) and numeric and any(map(str.isdigit, value)):
        with contextlib.suppress(ValueError):  # a string after all
            return complex(value)
    return value


def _calls(source: str) -> list[Any]:
    calls = [node for node in ast.walk(parse(source)) if isinstance(node, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Name)]

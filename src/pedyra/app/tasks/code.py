"""Generated code is scored: a program is extracted from a text, and the tests of its problem run in a sandbox.

The problems are those of HumanEval(+) and MBPP(+), from the Hub or from files of the same columns.
"""

from __future__ import annotations

import ast
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from textwrap import dedent
from typing import Any, Literal

from pedyra.app.tasks.sandbox import Sandbox
from pedyra.errors import UserError

Status = Literal["passed", "failed", "timeout", "unparsable"]
"""failed: a test failed, or the program raised or ended; unparsable: no program was found."""

STOP = ("\nclass ", "\ndef ", "\n#", "\n@", "\nif ", "\nprint(", "\nassert ", "\nimport ", "\nfrom ", "\n```", "\n<")
"""The completion of a function ends at the next statement without indentation (Chen et al. 2021, and EvalPlus)."""
STOP_WHOLE = ('\n"""', "\nassert ", "\nif __name__", "\nprint(", "\n```", "\n<")
"""The same for a function whose signature the model writes too."""


@dataclass(frozen=True, kw_only=True)
class CodeProblem:
    """A problem of any of the sets."""

    prompt: str  # a signature with its docstring (HumanEval), or a docstring before the function (MBPP)
    entry_point: str
    stop: tuple[str, ...]  # strings that end a completion of the prompt
    tests: str  # source with assertions about the entry point


def problems_of(rows: Sequence[dict[str, Any]], where: str) -> list[CodeProblem]:
    """Read the problems of rows of HumanEval(+) or MBPP(+); the columns say which."""
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
    if "test_list" in row:
        return _mbpp(row)
    tests = f"{row['test']}\ncheck({row['entry_point']})"
    return CodeProblem(prompt=row["prompt"], entry_point=row["entry_point"], stop=STOP, tests=tests)


def _mbpp(row: dict[str, Any]) -> CodeProblem:
    """Read MBPP, and the Hub's MBPP+, whose `test` is over all inputs beside MBPP's sanitized columns."""
    first = row["test_list"][0]
    called = [node.func for node in ast.walk(_parse(first)) if isinstance(node, ast.Call)]
    defined = {getattr(node, "name", None) for node in _parse(row["code"].replace("\r\n", "\n")).body}
    setup = [*row.get("test_imports", ()), row.get("test_setup_code", "").replace("\r\n", "\n")]
    return CodeProblem(
        # The form of MBPP+: the text and one test, in a docstring.
        prompt=f'"""\n{row["text"] if "text" in row else row["prompt"]}\n{first}\n"""\n',
        entry_point=next(each.id for each in called if isinstance(each, ast.Name) and each.id in defined),
        stop=STOP_WHOLE,
        tests="\n".join([*setup, row.get("test") or "\n".join(row["test_list"])]),
    )


_FENCE = re.compile(r"```([^\n`]*)\n(.*?)(?:```|\Z)", re.DOTALL)
"""A block in Markdown: its language, or nothing, and what is in it."""
_PYTHON = re.compile(r"\s*(?:(?:python[\d.]*|py)\b|$)", re.IGNORECASE)
_BEGINS = re.compile(r"^(?:def|class|import|from|@|async def|\w+ = )", re.MULTILINE)
_MOST_STARTS = 20  # lines that may begin the program
_MOST_LINES = 1000  # the time to find the part that parses grows with their square
_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
_KEPT = (*_FUNCTION, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AugAssign, ast.Try)


def extract(text: str, problem: CodeProblem) -> str:
    """Extract the program from a completion of the problem's prompt, or from a reply to it; "" where there is none.

    It is looked for in this order: the fenced blocks up to the first that defines the entry point with a body; the text
    from an import, a function, a class or a constant on; the prompt and the text, up to a stop string. Lines at the end
    that do not parse (a truncated function, prose) are dropped, and so are demonstrations. Imports and helper functions
    of the prompt are put before a reply.
    """
    blocks = [block for language, block in _FENCE.findall(text) if _PYTHON.match(language)]
    for body in _replies(text, blocks):
        if _defines(body, problem.entry_point):
            prompt = _longest(problem.prompt + "    pass\n")
            before = [node for node in prompt if getattr(node, "name", None) != problem.entry_point]
            return _unparse([*before, *body], problem.entry_point)
    end = min((at for stop in problem.stop if (at := text.find(stop)) >= 0), default=len(text))
    for continuation in (text[:end], *blocks):
        body = _longest(problem.prompt + continuation)
        if _defines(body, problem.entry_point):
            return _unparse(body, problem.entry_point)
    return ""


def _replies(text: str, blocks: Sequence[str]) -> Iterator[list[ast.stmt]]:
    """Yield candidates for a whole program: the blocks up to each one, else the text from each possible first line."""
    if blocks:
        before: list[ast.stmt] = []
        for block in blocks[:_MOST_STARTS]:
            before = [*before, *_longest(dedent(block))]
            yield before
        return
    # The tokenizer of Llama 2 begins a text with a space, and so does its model.
    text = text[1:] if re.match(r" \S", text) else text
    for begin, _ in zip(_BEGINS.finditer(text), range(_MOST_STARTS), strict=False):
        yield _longest(text[begin.start() :])


def _longest(source: str) -> list[ast.stmt]:
    """Parse as many of the first lines as can be parsed."""
    lines = source.splitlines()[:_MOST_LINES]
    for end in range(len(lines), 0, -1):
        try:
            return _parse("\n".join(lines[:end]) + "\n").body
        except SyntaxError:
            continue
    return []


def _parse(source: str) -> ast.Module:
    """Parse the source, with a SyntaxError for every failure of the parser."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (ValueError, MemoryError, RecursionError) as error:
            raise SyntaxError(str(error) or type(error).__name__) from None


def _defines(body: Sequence[ast.stmt], entry_point: str) -> bool:
    """Tell whether the program assigns this name, or defines it as a class or as a function with a body."""
    for node in body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", None) == entry_point for target in node.targets):
            return True
        if getattr(node, "name", None) == entry_point:
            if isinstance(node, ast.ClassDef) or (isinstance(node, _FUNCTION) and not all(map(_is_idle, node.body))):
                return True
    return False


def _is_idle(node: ast.stmt) -> bool:
    """Whether it is a docstring, `pass` or `...`."""
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _unparse(body: Sequence[ast.stmt], entry_point: str) -> str:
    """Write the program without top-level statements that print, read input, or call the entry point."""

    def shows(node: ast.AST) -> bool:
        called = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
        return any(getattr(each, "id", None) in ("print", "input", entry_point) for each in called)

    whole = (*_FUNCTION, ast.ClassDef)
    statements: list[ast.stmt] = [
        node for node in body if isinstance(node, _KEPT) and (isinstance(node, whole) or not shows(node))
    ]
    statements.sort(key=lambda node: getattr(node, "module", None) != "__future__")  # Python has them first
    try:
        return ast.unparse(ast.Module(body=statements, type_ignores=[]))
    except RecursionError:  # an expression thousands deep
        return ""


def check_all(problems: Sequence[CodeProblem], programs: Sequence[str], sandbox: Sandbox) -> list[Status]:
    """Run the tests of every problem on its program (of `extract`), in parallel on all processors."""

    def check(problem: CodeProblem, program: str) -> Status:
        return sandbox.run([program, problem.tests]) if program else "unparsable"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(check, problems, programs))

"""Written code is scored: a program is found in a model's text, and a problem's tests give the verdict.

A solution is scored in two sandboxes (`pedyra.app.tasks.code_judge`): one holds the solution and answers calls with
plain data, the other holds the tests and gives the verdict. The verdict comes over a pipe that the solution's
process does not have, so exiting, patching or lying about equality cannot make it. What this does not promise: a
solution may still know the tests by heart, as any model may that has read them; and arguments are
copies, so a test cannot see what a solution does to the list that it was given.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from textwrap import dedent
from typing import Any, Literal

from pedyra.app.tasks import code_judge
from pedyra.app.tasks.code_problems import CodeProblem, parse
from pedyra.app.tasks.sandbox import Sandbox

Status = Literal["passed", "failed", "error", "timeout", "unparsable"]


@dataclass(frozen=True)
class Judged:
    """A verdict says what became of one solution."""

    status: Status
    """It failed with a wrong result; error: it raised or ended; unparsable: no program was found."""
    reason: str = ""
    """The judge says this of a wrong result or an error, in words that may be the solution's own."""


_FENCE = re.compile(r"```([^\n`]*)\n(.*?)(?:```|\Z)", re.DOTALL)
"""This finds a block in Markdown: its language, or nothing, and what is in it."""
_PYTHON = re.compile(r"\s*(?:(?:python[\d.]*|py)\b|$)", re.IGNORECASE)
_CODE_STARTS = re.compile(r"^(?:def|class|import|from|@|async def)\b", re.MULTILINE)
_MOST_STARTS = 20
"""No more blocks, or lines that may begin the program, are tried."""
_MOST_LINES = 1000
"""No more lines are read: the time to find the part that parses grows with their square."""


def extract(text: str, problem: CodeProblem) -> str:
    """Find the program in what a model wrote after the problem's prompt, or in reply to it; "" where there is none.

    Three readings are tried in this order: the first fenced block that defines the entry point and gives it a body,
    with the imports, functions, classes and constants of the other blocks that it uses; the text from a function, class
    or import on, with the constants before it; the text as a continuation of the prompt, up to a stop string. What does
    not parse at the end (a function that was cut short, or prose) is left out, and so are demonstrations at the margin.
    Imports and helper functions of the prompt are put before.
    """
    blocks = [block for language, block in _FENCE.findall(text) if _PYTHON.match(language)]
    # Tokenizers that begin a text with a space (Llama 2) teach the model to begin with one.
    alone = text[1:] if re.match(r" \S", text) else text
    parsed = map(_longest, map(dedent, blocks) if blocks else _from_code(alone))
    programs = [program for program in islice(parsed, _MOST_STARTS) if program is not None]
    for program in programs:
        if _defines(program, problem.entry_point):
            preamble = _longest(problem.prompt + "    pass\n") or ast.Module([], [])
            body = [node for node in preamble.body if not _is_entry(node, problem.entry_point)]
            others = [each for each in programs if each is not program] if blocks else []
            others = _helpers(others, program, problem.entry_point)
            return _unparse([*body, *others, *program.body], problem.entry_point)
    cut = min((at for stop in problem.stop if (at := text.find(stop)) >= 0), default=len(text))
    for continuation in (text[:cut], *blocks):
        program = _longest(problem.prompt + continuation, len(problem.prompt.splitlines()))
        if program is not None and _has_body(program, problem.entry_point):
            return _unparse(program.body, problem.entry_point)
    return ""


def _from_code(text: str) -> Iterator[str]:
    """Yield the text from each line on that may begin a function, class or import (or is prose: "from here on"), with
    the lines before it from where they parse."""
    for start in _CODE_STARTS.finditer(text):
        before = text[: start.start()].splitlines()
        for first in range(max(0, len(before) - _MOST_LINES), len(before)):
            try:
                parse("\n".join(before[first:]))
            except SyntaxError:
                continue
            yield "\n".join([*before[first:], text[start.start() :]])
            break
        else:
            yield text[start.start() :]


def _helpers(others: Sequence[ast.Module], program: ast.Module, entry_point: str) -> list[ast.stmt]:
    """Find the imports, functions, classes and constants of other blocks that the program uses, and that these use."""
    known: dict[str, ast.stmt] = {}
    for node in (node for each in others for node in each.body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            known |= {(alias.asname or alias.name).partition(".")[0]: node for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            known[node.name] = node
        elif isinstance(node, ast.Assign) and not _shows(node.value, entry_point):
            known |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    for node in program.body:
        known.pop(getattr(node, "name", ""), None)
    found: dict[ast.stmt, None] = {}
    nodes: list[ast.stmt] = [*program.body]
    while nodes:
        used = {each.id for each in ast.walk(nodes.pop()) if isinstance(each, ast.Name)}
        new = [known[name] for name in sorted(used & known.keys()) if known[name] not in found]
        found |= dict.fromkeys(new)
        nodes += new
    return [*reversed(found)]  # a helper comes before what uses it


def _longest(source: str, least: int = 0) -> ast.Module | None:
    """Parse the longest run of first lines, more than `least`, that can be parsed."""
    lines = source.splitlines()[:_MOST_LINES]
    for end in range(len(lines), least, -1):
        try:
            return parse("\n".join(lines[:end]) + "\n")
        except SyntaxError:
            continue
    return None


def _is_entry(node: ast.stmt, entry_point: str) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == entry_point


def _defines(program: ast.Module, entry_point: str) -> bool:
    """Return whether the program gives this name a value, or a function or class that is more than its head."""
    assigned = {t.id for n in program.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    is_class = any(isinstance(node, ast.ClassDef) and node.name == entry_point for node in program.body)
    return entry_point in assigned or is_class or _has_body(program, entry_point)


def _has_body(program: ast.Module, entry_point: str) -> bool:
    """Return whether the function is more than its docstring, `pass` and `...`."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in program.body if isinstance(node, kinds) and node.name == entry_point]
    return bool(found) and not all(
        isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
        for s in found[-1].body
    )


def _demonstrates(node: ast.stmt, entry_point: str) -> bool:
    """Return whether it is an assert, an expression that calls nothing, one that prints, asks or is a trial, or a
    name with a colon behind it, which may be prose ("Explanation: fine")."""
    if not isinstance(node, ast.Expr):
        return isinstance(node, ast.Assert) or (isinstance(node, ast.AnnAssign) and node.value is None)
    return _shows(node, entry_point) or not any(isinstance(each, ast.Call) for each in ast.walk(node))


def _shows(node: ast.AST, entry_point: str) -> bool:
    """Return whether it prints something, asks for something, or tries the entry point."""
    called = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
    return any(isinstance(each, ast.Name) and each.id in ("print", "input", entry_point) for each in called)


def _unparse(body: list[ast.stmt], entry_point: str) -> str:
    kept = [node for node in body if not _demonstrates(node, entry_point)]
    kept.sort(key=lambda node: getattr(node, "module", None) != "__future__")  # Python has them first
    try:
        return ast.unparse(ast.Module(body=kept, type_ignores=[]))
    except RecursionError:  # an expression thousands deep
        return ""


# --------------------------------------------------------------------------- scoring


def check(problem: CodeProblem, program: str, sandbox: Sandbox) -> Judged:
    """Run the program (of `extract`) against the problem's tests in the sandbox. May be called from several threads.

    Raises SandboxRefused where the sandbox cannot be set up, never for what the program does.
    """
    try:
        if not parse(program).body:
            return Judged("unparsable")
    except SyntaxError:
        return Judged("unparsable")
    job = {name: getattr(problem, name) for name in ("entry_point", "setup", "tests")} | {"program": program}
    in_time, verdict = _hear(json.dumps(job).encode(), sandbox)
    return Judged(**verdict) if in_time else Judged("timeout")


def check_all(problems: Sequence[CodeProblem], programs: Sequence[str], sandbox: Sandbox) -> list[Judged]:
    """Run `check` on the program of every problem, as many at once as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda problem, program: check(problem, program, sandbox), problems, programs))


def _hear(job: bytes, sandbox: Sandbox) -> tuple[bool, dict[str, Any]]:
    """Return whether the solution ended in time, and the verdict of the judge."""
    source = Path(code_judge.__file__).read_text(encoding="utf-8")
    questions, ask = os.pipe()
    answers, tell = os.pipe()
    try:
        solution = sandbox.start(f"{source}\nanswer({questions}, {tell})", keep=(questions, tell))
        try:
            judge = sandbox.start(f"{source}\njudge({ask}, {answers})", keep=(ask, answers), piped=True)
        except OSError:
            solution.kill()
            raise
    finally:
        for fd in (questions, ask, answers, tell):
            os.close(fd)
    in_time, told = sandbox.finish(judge, job)
    verdict = json.loads(told) if told else {"status": "error", "reason": "the tests did not end"}
    if not in_time or verdict["status"] in ("passed", "failed"):
        solution.kill()  # it may have left something running
    ended_in_time, _ = sandbox.finish(solution)
    return in_time and ended_in_time, verdict

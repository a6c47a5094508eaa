"""Two programs score a solution, each in a sandbox of its own: one answers calls, the other judges.

`answer` holds the solution. It is sent calls and sends plain data back; it never sees a test, an expected result or
the channel of the verdict. `judge` holds the tests, and runs nothing of the solution: a patched
assert, an object that equals everything or an early exit stays on the other side. Standard library only: the text of
this file is what runs.
"""

from __future__ import annotations

import ast
import builtins
import collections
import decimal
import fractions
import json
import numbers
import os
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

_SEQUENCES = (tuple, set, frozenset, collections.deque)
LONGEST = 64 << 20
"""No message has more bytes."""


class CandidateError(Exception):
    """The solution raised, ended, or answered with something that is no plain data."""

    def __init__(self, reason: str) -> None:
        self.args = (reason,)  # a builtin class beside this one may ask for more

    def __str__(self) -> str:
        return self.args[0]


def encode(value: Any, keep: Callable[[Any], int] | None = None) -> Any:
    """Make what JSON can hold, with a tag where it has no such type. `keep` numbers objects that are no plain data."""
    if isinstance(value, getattr(sys.modules.get("numpy"), "generic", ())):
        value = value.item()  # a scalar of NumPy, which compares as the plain one does
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        number = int(value)  # decimal digits of long ones take quadratic time
        return number if -(1 << 64) < number < 1 << 64 else {"int": hex(number)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, decimal.Decimal):
        return {"decimal": str(value)}
    if isinstance(value, fractions.Fraction):
        return {"fraction": [hex(value.numerator), hex(value.denominator)]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, list):
        return [encode(item, keep) for item in value]
    for kind in _SEQUENCES:
        if isinstance(value, kind):
            return {kind.__name__: [encode(item, keep) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, keep), encode(item, keep)] for key, item in value.items()]}
    if isinstance(value, Remote):
        return {"object": value._reference}
    if isinstance(value, type) and vars(builtins).get(value.__name__) is value:
        return {"type": value.__name__}
    if keep is None:
        raise TypeError(f"a {type(value).__name__} cannot be sent")
    return {"object": keep(value)}


def decode(value: Any, find: Callable[[Any], Any]) -> Any:
    """Undo `encode`; `find` gives the object of a number or name. Raises ValueError and TypeError."""
    if isinstance(value, list):
        return [decode(item, find) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "object":
        return find(held)
    if kind == "type" and isinstance(vars(builtins)[held], type):
        return vars(builtins)[held]
    if kind == "int":
        return int(held, 16)
    if kind == "complex":
        return complex(*held)
    if kind == "decimal":
        return decimal.Decimal(held)
    if kind == "fraction":
        return fractions.Fraction(*(int(part, 16) for part in held))
    if kind == "bytes":
        return bytes.fromhex(held)
    if kind == "dict":
        return {decode(key, find): decode(item, find) for key, item in held}
    return {k.__name__: k for k in _SEQUENCES}[kind](decode(item, find) for item in held)


def send(fd: int, message: Any) -> None:
    text = json.dumps(message).encode()
    rest = memoryview(struct.pack(">I", len(text)) + text)
    while rest:
        rest = rest[os.write(fd, rest) :]


def receive(fd: int) -> Any:
    """Read one message. Raises EOFError at the end of the pipe, ValueError for what is no message."""
    (length,) = struct.unpack(">I", _read(fd, 4))
    if length > LONGEST:
        raise ValueError(f"a message of {length} bytes")
    return json.loads(_read(fd, length))


def _read(fd: int, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = os.read(fd, min(length - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def answer(questions: int, answers: int) -> None:
    """Run the program that comes first, then what is asked, until the questions end."""
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # dataclasses and pickle look a class's module up
    space, kept = vars(module), []

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    def find(reference: Any) -> Any:
        if isinstance(reference, int):
            return kept[reference]
        if reference not in space:
            raise NameError(f"name {reference!r} is not defined")
        return space[reference]

    while True:
        try:
            question = receive(questions)
        except EOFError:
            return
        try:
            match question["do"]:
                case "run":
                    exec(compile(question["program"], "<solution>", "exec"), space)
                    result = None
                case "call":
                    arguments = decode(question["arguments"], find)
                    result = find(question["of"])(*arguments, **decode(question["named"], find))
                case "list":
                    result = list(find(question["of"]))
                case "length":
                    result = len(find(question["of"]))
                case "truth":
                    result = bool(find(question["of"]))
                case "item":
                    result = find(question["of"])[decode(question["key"], find)]
                case "get":
                    result = getattr(find(question["of"]), question["name"])
                case "set":
                    result = setattr(find(question["of"]), question["name"], decode(question["to"], find))
            told = {"value": encode(result, keep)}
        except BaseException as error:  # also SystemExit: whatever ends the solution is an answer
            told = {"raised": f"{type(error).__name__}: {error}"[:300], "type": _builtin(error)}
        send(answers, told)


def _builtin(error: BaseException) -> str | None:
    """Name the nearest class of the error that Python itself has."""
    names = (kind.__name__ for kind in type(error).__mro__ if vars(builtins).get(kind.__name__) is kind)
    return next(names, None)


def _raised(reason: str, name: Any) -> CandidateError:
    """Make the error that the tests get; it is also one of the builtin class of this name, which they may expect.

    StopIteration is left out: it would end a loop of the tests as if all of them had passed.
    """
    kind = vars(builtins).get(name)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return CandidateError(reason)
    if issubclass(kind, (StopIteration, StopAsyncIteration)):
        return CandidateError(reason)
    return type("CandidateError", (CandidateError, kind), {})(reason)


class Candidate:
    """The tests see the solution by this: what it defines can be called, and answers with plain data."""

    def __init__(self, questions: int, answers: int) -> None:
        self._questions, self._answers = questions, answers

    def ask(self, **question: Any) -> Any:
        try:
            send(self._questions, question)
            told = receive(self._answers)
            if not isinstance(told, dict) or "raised" in told:
                raise _raised(str(told["raised"])[:300], told.get("type"))
            return decode(told["value"], lambda reference: Remote(self, reference))
        except CandidateError:
            raise
        except (EOFError, BrokenPipeError):
            raise CandidateError("the program ended") from None
        except Exception as error:
            raise CandidateError(f"the answer is no plain data ({type(error).__name__}: {error})"[:300]) from None


class Remote:
    """This stands for a function or object of the solution. It says what it holds; its own `==` is never asked."""

    def __init__(self, candidate: Candidate, reference: Any) -> None:
        vars(self).update(_candidate=candidate, _reference=reference)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        sent = {"arguments": encode(list(arguments)), "named": encode(named)}
        return self._candidate.ask(do="call", of=self._reference, **sent)

    def __iter__(self) -> Any:
        return iter(self._candidate.ask(do="list", of=self._reference))

    def __len__(self) -> Any:
        return self._candidate.ask(do="length", of=self._reference)

    def __bool__(self) -> bool:
        return self._candidate.ask(do="truth", of=self._reference) is True

    def __getitem__(self, key: Any) -> Any:
        return self._candidate.ask(do="item", of=self._reference, key=encode(key))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._candidate.ask(do="get", of=self._reference, name=name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._candidate.ask(do="set", of=self._reference, name=name, to=encode(value))


def judge(questions: int, answers: int) -> None:
    """Read a job from stdin, write the verdict to stdout: one JSON object each.

    Job: program, entry_point, setup and tests, as Python text. Verdict: status (passed, failed, error) and reason. What
    tests print is dropped.
    """
    verdict_to, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    job = json.loads(sys.stdin.buffer.read())
    candidate = Candidate(questions, answers)
    try:
        candidate.ask(do="run", program=job["program"])
        _run_tests(job, candidate)
        verdict = {"status": "passed", "reason": ""}
    except CandidateError as error:  # which may be an AssertionError too
        verdict = {"status": "error", "reason": str(error)}
    except AssertionError as error:
        verdict = {"status": "failed", "reason": str(error)}
    except Exception as error:  # a test that cannot work with what it was given
        verdict = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
    os.write(verdict_to, json.dumps(verdict).encode())


def _run_tests(job: dict[str, Any], candidate: Candidate) -> None:
    space: dict[str, Any] = {"__name__": "tests"}
    tree = ast.parse(job["setup"] + "\n" + job["tests"])
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)} | set(vars(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != job["entry_point"]:
            bound.add(node.name)
        bound |= {alias.asname or alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)}
    for name in {node.id for node in names} - bound:
        # Tests of MBPP name a module that only the solution imports.
        known = name in sys.stdlib_module_names
        space[name] = __import__(name) if known else Remote(candidate, name)
    exec(compile(job["setup"], "<setup>", "exec"), space)
    space[job["entry_point"]] = Remote(candidate, job["entry_point"])
    exec(compile(job["tests"], "<tests>", "exec"), space)

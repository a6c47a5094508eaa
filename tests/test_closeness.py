"""Tests compare numbers to the last bit by `closeness` alone, and its two functions tell the two senses apart."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from closeness import close, same_bits

TESTS = Path(__file__).parent
# `closeness.py` is the helper itself; what is in `soak` runs as scripts, which cannot import it.
FREE = {"closeness.py", "soak"}
TOLERANCES = [("rtol", "atol"), ("rel", "abs")]


def _is_zero(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value == 0


def _is_equation(node: ast.expr) -> bool:
    """`a == b`; not `a == 0`, to which no rounding leads."""
    return (
        isinstance(node, ast.Compare)
        and isinstance(node.ops[0], ast.Eq)
        and not isinstance(node.comparators[0], ast.Constant)
    )


def compared_to_the_last_bit(code: str) -> Iterator[int]:
    """The lines with `torch.equal` or the like, `(a == b).all()`, and comparisons whose tolerance is 0."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if any(_is_zero(given.get(one)) and _is_zero(given.get(other)) for one, other in TOLERANCES):
            yield node.lineno
        elif isinstance(node.func, ast.Attribute):  # a method, or a function of a module
            if node.func.attr in ("equal", "array_equal", "assert_array_equal"):
                yield node.lineno
            elif node.func.attr == "all" and any(map(_is_equation, [node.func.value, *node.args])):
                yield node.lineno


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("torch.equal(a, b)", True),
        ("a.equal(b)", True),
        ("(a == b).all()", True),
        ("torch.all(a == b)", True),
        ("torch.testing.assert_close(a, b, rtol=0, atol=0)", True),
        ("x == pytest.approx(y, rel=0.0, abs=0.0)", True),
        ("torch.testing.assert_close(a, b, rtol=0, atol=1e-6)", False),
        ("all(x == y for x, y in pairs)", False),
        ("(a > b).all()", False),
        ("torch.all(a == 0)", False),
    ],
)
def test_the_rule_knows_a_comparison_of_bits(code, found):
    assert list(compared_to_the_last_bit(code)) == ([1] if found else [])


def test_only_the_helper_compares_to_the_last_bit():
    """Use same_bits where one computation ran twice or values were copied, else close."""
    lines = [
        f"{path.relative_to(TESTS)}:{line}"
        for path in sorted(TESTS.rglob("*.py"))
        if path.relative_to(TESTS).parts[0] not in FREE
        for line in compared_to_the_last_bit(path.read_text())
    ]
    assert not lines, "compare with closeness.same_bits or closeness.close"


def test_the_last_bit_is_seen_by_one_and_overlooked_by_the_other():
    a = torch.randn(8)
    b = torch.nextafter(a, torch.tensor(torch.inf))
    assert same_bits(a, a.clone()) and not same_bits(a, b) and close(b, a)
    assert not same_bits(a, a.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_sum_in_another_order_is_close_and_what_is_farther_off_is_not(dtype):
    terms = torch.randn(256, 50, dtype=torch.float64).to(dtype)
    there, back = (sum(rows, torch.zeros(50, dtype=dtype)) for rows in (list(terms), list(terms.flip(0))))
    scale = float(terms.double().cumsum(0).abs().max())  # of the sums on the way
    assert not same_bits(there, back)  # so the order is seen
    assert close(there, back, terms=256, scale=scale)
    wrong = there + 16 * torch.finfo(dtype).eps * 16 * scale
    assert not close(wrong, there, terms=256, scale=scale)


def test_other_shapes_and_nan_are_never_close():
    a = torch.ones(3)
    assert not close(a, a[:2]) and not close(a, a * torch.nan) and close(a[:0], a[:0])

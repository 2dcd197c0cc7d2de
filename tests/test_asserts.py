"""`python -O` removes asserts, so none may guard data: they only say to mypy what a type is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pbsfs

PACKAGE = Path(pbsfs.__file__).parent


def guards(source: str) -> Iterator[ast.Assert]:
    """The asserts of `source` that check more than `is not None` or the type of a value."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert) and not narrows(node.test):
            yield node


def narrows(test: ast.expr) -> bool:
    if isinstance(test, ast.Call):
        return isinstance(test.func, ast.Name) and test.func.id == "isinstance"
    if not isinstance(test, ast.Compare) or not isinstance(test.ops[0], ast.IsNot):
        return False
    return len(test.ops) == 1 and ast.unparse(test.comparators[0]) == "None"


def test_asserts_only_narrow_types() -> None:
    paths = sorted(PACKAGE.rglob("*.py"))
    assert PACKAGE / "reader" / "reader.py" in paths
    found = [f"{p.relative_to(PACKAGE)}:{a.lineno}" for p in paths for a in guards(p.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "source",
    ["assert x", "assert len(a) == b", "assert x is None", "assert f(x)", "assert a is not b is not None"],
)
def test_an_assert_that_guards_data_is_found(source: str) -> None:
    assert list(guards(source))


@pytest.mark.parametrize("source", ["assert x is not None", "assert isinstance(x, Exception), 'why'"])
def test_an_assert_that_narrows_a_type_is_fine(source: str) -> None:
    assert not list(guards(source))

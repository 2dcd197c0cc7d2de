"""docs/troubleshooting.md and the messages in the code name each other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from pbsfs.base import errors
from tests.support.messages import DOCUMENT, HOLE, ROW, documented, fragments, is_in

CHECKOUT = Path(__file__).resolve().parent.parent
INTERNAL = {
    "the source is being closed": "nobody waits for it any more",
    "frame of": "becomes the loss of the connection",
    "data without a stream": "becomes the loss of the connection",
}
"""Messages that no user meets, and why."""

EXPLAINED = {
    kind.__name__
    for kind in vars(errors).values()
    if isinstance(kind, type)
    and issubclass(kind, errors.PbsfsError)
    and kind.exit_status not in (1, 2, 3, 4, 6)  # of many messages each, which the document has as groups
}
"""Errors of which the document has every message."""


@dataclass(frozen=True)
class Template:
    """Text in the code, with `…` for what is filled in. `kind`: the call whose first argument it is."""

    place: str
    kind: str
    text: str


def text_of(node: ast.AST) -> str | None:
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"%[sdr]", HOLE, text)
        case ast.JoinedStr(values=values):
            return "".join(text_of(value) or HOLE for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return (text_of(left) or HOLE) + (text_of(right) or HOLE)
    return None


@cache
def templates() -> tuple[Template, ...]:
    return tuple(found())


def found() -> Iterator[Template]:
    for path in sorted((CHECKOUT / "pbsfs").rglob("*.py")):
        if "testing" in path.parts:
            continue
        place = str(path.relative_to(CHECKOUT))
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if (text := text_of(node)) is not None:
                yield Template(f"{place}:{getattr(node, 'lineno', 0)}", "", text)
            if isinstance(node, ast.Call) and node.args and (text := text_of(node.args[0])) is not None:
                function = node.func
                name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
                yield Template(f"{place}:{node.lineno}", name, text)


@pytest.mark.parametrize("message", [message for message, _statuses in documented()])
def test_a_documented_message_is_in_the_code(message: str) -> None:
    assert sum(map(len, fragments(message))) >= 8, "too short to recognise"
    assert any(is_in(message, template.text) for template in templates())


def test_every_row_of_the_document_is_read() -> None:
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    heads = [line for line in rows if line.startswith(("| message |", "| ---"))]
    assert len(ROW.findall(DOCUMENT.read_text())) == len(rows) - len(heads)


def test_every_status_is_one_that_pbsfs_has() -> None:
    known = {0} | {kind.exit_status for kind in vars(errors).values() if hasattr(kind, "exit_status")}
    assert set().union(*(statuses for _message, statuses in documented())) <= known


def test_every_warning_and_every_error_of_the_explained_kinds_is_documented() -> None:
    messages = [message for message, _statuses in documented()]
    missing = [
        f"{template.place}: {template.text}"
        for template in templates()
        if template.kind in EXPLAINED | {"MemoryLimitError"} or (template.kind == "warning" and template.text)
        if re.search("[a-z] ?[a-z]{2}", template.text)  # not only of parts that have their own texts
        if not any(is_in(message, template.text) for message in messages)
        if not any(begin in template.text for begin in INTERNAL)
    ]
    assert missing == []

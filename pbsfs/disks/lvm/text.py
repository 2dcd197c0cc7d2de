"""The text form of LVM2's metadata: sections of values, numbers, strings and lists (lvm.conf(5)).

Called by `lvm.groups`. A pure function.
"""

from __future__ import annotations

import re
from typing import TypeAlias

from pbsfs.base.errors import DamageError

Value: TypeAlias = "int | str | list[Value] | Section"
Section: TypeAlias = "dict[str, Value]"

MOST_TOKENS = 600_000
"""Names, values and signs of a text: those of some 4,000 logical volumes."""

_DEEPEST = 8
"""Sections and lists in each other; LVM2 writes four."""

_TOKEN = re.compile(
    rb"(?:[\s\0]++|#[^\n]*+)*+"
    rb"(?:(?P<word>[A-Za-z0-9_.+\-/]++)|\"(?P<string>(?:[^\"\\]++|\\.)*+)\"|(?P<sign>[={}\[\],])|(?P<end>\Z))",
    re.DOTALL,
)
_ESCAPE = re.compile(rb"\\(.)", re.DOTALL)


def parse(text: bytes) -> Section:
    """The sections of a text, by name. Raises DamageError."""
    return _Parser(text).whole()


class _Parser:
    def __init__(self, text: bytes) -> None:
        self._text = text
        self._at = 0
        self._count = 0
        self._kind = ""
        self._token = ""
        self._next()

    def whole(self) -> Section:
        section = self._section(0)
        if self._kind != "end":
            raise self._wrong()
        return section

    def _next(self) -> None:
        self._count += 1
        found = _TOKEN.match(self._text, self._at)
        if found is None or found.lastgroup is None:
            raise self._wrong()
        if self._count > MOST_TOKENS:
            raise DamageError("the LVM metadata is too large")
        self._kind = found.lastgroup
        raw = found[self._kind]
        if self._kind == "string":
            raw = _ESCAPE.sub(rb"\1", raw)
        self._token = raw.decode("utf-8", "replace")
        self._at = found.end()

    def _wrong(self) -> DamageError:
        return DamageError(f"the LVM metadata is not valid at byte {self._at}")

    def _accept(self, sign: str) -> bool:
        if self._kind == "sign" and self._token == sign:
            self._next()
            return True
        return False

    def _section(self, depth: int) -> Section:
        if depth > _DEEPEST:
            raise DamageError("the LVM metadata is nested too deep")
        found: Section = {}
        while self._kind in {"word", "string"}:
            name = self._token
            self._next()
            if name in found:
                raise DamageError(f"the LVM metadata has {name[:200]!r} twice in one section")
            if self._accept("{"):
                found[name] = self._section(depth + 1)
                if not self._accept("}"):
                    raise self._wrong()
            elif self._accept("="):
                found[name] = self._value(depth + 1)
            else:
                raise self._wrong()
        return found

    def _value(self, depth: int) -> Value:
        if depth > _DEEPEST:
            raise DamageError("the LVM metadata is nested too deep")
        if self._accept("["):
            values: list[Value] = []
            while not self._accept("]"):
                values.append(self._value(depth + 1))
                if not self._accept(","):
                    if self._accept("]"):
                        break
                    raise self._wrong()
            return values
        if self._kind not in {"word", "string"}:
            raise self._wrong()
        kind, token = self._kind, self._token
        self._next()
        if kind == "word" and token.isascii() and token.isdigit() and len(token) < 20:
            return int(token)
        return token

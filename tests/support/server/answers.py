"""Requests and answers, as the API and the reader protocol share them.

Immutable values without I/O. `RefusedError` is raised by whoever handles a request and becomes an answer
at the connection.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

JSON = "application/json;charset=UTF-8"
OCTETS = "application/octet-stream"

_ZEROS = bytes(1 << 16)


@dataclass(frozen=True, slots=True)
class Request:
    """A request. `headers`: by lower-case name; `target`: path and query as they came."""

    method: str
    target: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))

    @property
    def parameters(self) -> dict[str, Any]:
        """Those of the query, and of the body where there is one (JSON or a form)."""
        found: dict[str, Any] = dict(self.query)
        if self.body:
            if self.headers.get("content-type", "").startswith("application/json"):
                try:
                    found.update(json.loads(self.body))
                except (ValueError, TypeError) as error:
                    raise RefusedError(400, f"unable to parse body as json: {error}") from None
            else:
                found.update(parse_qsl(self.body.decode(errors="replace"), keep_blank_values=True))
        return found


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer.

    `streamed`: its length is not told beforehand. `padding`: zero bytes that follow `body`. The rest
    is what faults make of it: `announced`, the length that is told whatever is sent; `reset`, an
    error code that the stream is reset with in place of its end; `cut`, whether the end is missing;
    `endless`, whether the header block never ends.
    """

    status: int
    body: bytes = b""
    content_type: str | None = JSON
    headers: tuple[tuple[str, str], ...] = ()
    streamed: bool = False
    padding: int = 0
    announced: int | None = None
    reset: int | None = None
    cut: bool = False
    endless: bool = False

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return len(self.body) + self.padding

    @property
    def faulty(self) -> bool:
        """Whether nothing more can be said on an HTTP/1 connection after it."""
        return self.cut or self.endless or (self.announced is not None and self.announced != self.size)

    def pieces(self) -> Iterator[bytes]:
        """The body, none of its pieces empty."""
        if self.body:
            yield self.body
        left = self.padding
        while left > 0:
            yield _ZEROS[:left]
            left -= len(_ZEROS)

    def fields(self) -> list[tuple[str, str]]:
        """The header fields but for how the body is delimited where its length is not told."""
        found = list(self.headers)
        if self.content_type is not None:
            found.append(("content-type", self.content_type))
        if not self.streamed or self.announced is not None:
            length = self.size if self.announced is None else self.announced
            found.append(("content-length", str(length)))
        return found


class RefusedError(Exception):
    """A request that is refused, with the status and the text that the client gets."""

    def __init__(self, status: int, text: str, *, content_type: str | None = JSON) -> None:
        super().__init__(text)
        self.answer = Answer(status, text.encode(), content_type)


def data(value: object, *, streamed: bool = False, headers: tuple[tuple[str, str], ...] = ()) -> Answer:
    """The API's good answer: `{"data": value}`."""
    return Answer(200, json.dumps({"data": value}).encode(), headers=headers, streamed=streamed)


def reason(status: int) -> str:
    """The phrase that goes with a status."""
    return HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Unknown"

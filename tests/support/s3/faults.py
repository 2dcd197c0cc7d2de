"""What the object store can be told to answer instead of the truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Fault:
    """One answer that is wrong."""


@dataclass(frozen=True, slots=True)
class Status(Fault):
    """An error document, or with `text` another body."""

    status: int
    code: str = ""
    message: str = "made"
    headers: Mapping[str, str] = field(default_factory=dict)
    extra: str = ""
    text: str | None = None

    @property
    def body(self) -> bytes:
        if self.text is not None:
            return self.text.encode()
        return (
            '<?xml version="1.0" encoding="UTF-8"?>'
            f"<Error><Code>{self.code}</Code><Message>{self.message}</Message>{self.extra}</Error>"
        ).encode()


@dataclass(frozen=True, slots=True)
class Body(Fault):
    """A successful answer with this body."""

    body: bytes


@dataclass(frozen=True, slots=True)
class Cut(Fault):
    """The true answer, whose body ends after `size` bytes with the connection.

    `announced`: whether its headers say how long it would be.
    """

    size: int
    announced: bool = True


@dataclass(frozen=True, slots=True)
class Reset(Fault):
    """No answer: the connection is reset."""


@dataclass(frozen=True, slots=True)
class Stall(Fault):
    """No answer, and the connection stays, until the other side closes it. `after`: bytes of the true
    answer's body that come before; None: not even headers."""

    after: int | None = None

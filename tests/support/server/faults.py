"""Faults that tests declare: what goes wrong, in which request, how often.

A fault goes for requests whose target (path and query) contains `match`, after the first `skip` of
them, `times` times (None: always). `hits` counts how often it struck. Tests add faults from their own
threads; the server's loop takes them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from tests.support.server.answers import JSON, OCTETS, Answer
from tests.support.server.gate import Gate
from tests.support.server.zipbomb import zip_bomb

_LONG = 20.0  # seconds; only when something is broken does a fault not strike


@dataclass(eq=False, kw_only=True)
class Fault:
    """What all faults have."""

    match: str | None = None
    times: int | None = 1
    skip: int = 0
    hits: int = field(default=0, init=False)
    _struck: threading.Event = field(default_factory=threading.Event, init=False, repr=False)

    def wait(self) -> None:
        """Waits until it struck, for tests that are not async."""
        assert self._struck.wait(_LONG), f"never happened: {self}"

    def goes_for(self, target: str) -> bool:
        return self.match is None or self.match in target

    @property
    def spent(self) -> bool:
        return self.times is not None and self.hits >= self.times

    def strike(self) -> None:
        self.hits += 1
        self._struck.set()


# --- on the wire: counted in bytes that the server sends, TLS included


@dataclass(eq=False, kw_only=True)
class WireFault(Fault):
    """`after_bytes`: how many are sent before it strikes, since the request that matches arrived; without
    `match`, since the connection was made, which includes the TLS handshake (and `skip` means nothing)."""

    after_bytes: int = 0


@dataclass(eq=False, kw_only=True)
class Drop(WireFault):
    """The connection is closed; with `reset`, by a TCP reset and not in order."""

    reset: bool = False


@dataclass(eq=False, kw_only=True)
class Stall(WireFault):
    """Nothing more is sent on the connection, which stays open, until `resume` is called."""

    _gate: Gate = field(default_factory=Gate, init=False, repr=False)

    def resume(self) -> None:
        self._gate.release()

    async def stalled(self) -> None:
        await self._gate.released()


# --- on one answer


@dataclass(eq=False, kw_only=True)
class AnswerFault(Fault):
    """Changes the answer to a request."""

    def change(self, answer: Answer) -> Answer:
        raise NotImplementedError


@dataclass(eq=False, kw_only=True)
class Status(AnswerFault):
    """Another status, with a text; the request is not looked at. Both parts of the protocol."""

    status: int
    text: str = "made to fail"

    def change(self, answer: Answer) -> Answer:
        return Answer(self.status, self.text.encode(), JSON)


@dataclass(eq=False, kw_only=True)
class Body(AnswerFault):
    """Another body, of the right length. `make` gets the right one."""

    make: Callable[[bytes], bytes]

    def change(self, answer: Answer) -> Answer:
        return replace(answer, body=self.make(answer.body))


@dataclass(eq=False, kw_only=True)
class Corrupt(AnswerFault):
    """One byte of the body is another; `at` counts from the end where it is negative."""

    at: int = -1

    def change(self, answer: Answer) -> Answer:
        body = bytearray(answer.body)
        if body:
            body[min(self.at, len(body) - 1)] ^= 0x10
        return replace(answer, body=bytes(body))


@dataclass(eq=False, kw_only=True)
class Truncate(AnswerFault):
    """The body ends early, `missing` bytes before its end. The stream ends in order all the same, with
    the whole length announced where it is announced at all; an HTTP/1 connection is closed."""

    missing: int = 1

    def change(self, answer: Answer) -> Answer:
        announced = None if answer.streamed else len(answer.body)
        body = answer.body[: max(0, len(answer.body) - self.missing)]
        return replace(answer, body=body, announced=announced, cut=True)


@dataclass(eq=False, kw_only=True)
class WrongLength(AnswerFault):
    """The announced length is off by `by`; the body is right."""

    by: int = 1

    def change(self, answer: Answer) -> Answer:
        return replace(answer, announced=len(answer.body) + self.by, streamed=False)


@dataclass(eq=False, kw_only=True)
class Huge(AnswerFault):
    """A body of `size` bytes: the right one, and then zeros. `announce`: whether its length is told."""

    size: int = 10 << 30
    announce: bool = False

    def change(self, answer: Answer) -> Answer:
        padding = max(0, self.size - len(answer.body))
        return replace(answer, padding=padding, streamed=not self.announce, announced=None)


@dataclass(eq=False, kw_only=True)
class ZipBomb(AnswerFault):
    """A small blob that unpacks to `size` bytes. `announce`: whether its zstd frame says so."""

    size: int = 10 << 30
    announce: bool = False

    def change(self, answer: Answer) -> Answer:
        return Answer(200, zip_bomb(self.size, announce=self.announce), OCTETS)


@dataclass(eq=False, kw_only=True)
class EndlessHeaders(AnswerFault):
    """A header block that goes on until the client hangs up."""

    def change(self, answer: Answer) -> Answer:
        return Answer(200, endless=True)


@dataclass(eq=False, kw_only=True)
class Reset(AnswerFault):
    """The stream is reset with an error code once `after_bytes` of the body are sent (reader only)."""

    code: int = 2  # INTERNAL_ERROR
    after_bytes: int = 0

    def change(self, answer: Answer) -> Answer:
        return replace(answer, body=answer.body[: self.after_bytes], announced=answer.size, reset=self.code)


@dataclass(eq=False, kw_only=True)
class Hold(Fault):
    """The answer waits until `release` is called; others go on."""

    _gate: Gate = field(default_factory=Gate, init=False, repr=False)

    def release(self) -> None:
        self._gate.release()

    async def held(self) -> None:
        await self._gate.released()


# --- on a session


@dataclass(eq=False, kw_only=True)
class GoAway(Fault):
    """The session ends with a GOAWAY when the request arrives. Streams up to `last_stream_id` (None: all
    before this request) are still answered, others are dropped; then the connection is closed."""

    code: int = 0
    last_stream_id: int | None = None


@dataclass(eq=False, kw_only=True)
class Garbage(Fault):
    """After the upgrade something else than HTTP/2 is sent, and the connection is closed."""

    data: bytes = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n"


F = TypeVar("F", bound=Fault)


class Faults:
    """The faults of a server."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._all: list[Fault] = []

    def add(self, fault: F) -> F:
        """Declares a fault; returns it."""
        with self._guard:
            self._all.append(fault)
        return fault

    def clear(self) -> None:
        """Takes all faults back, and lets go of what they hold."""
        with self._guard:
            known, self._all = self._all, []
        for fault in known:
            if isinstance(fault, Stall):
                fault.resume()
            elif isinstance(fault, Hold):
                fault.release()

    def take(self, kind: type[F], target: str) -> F | None:
        """The first fault of a kind that strikes now, if any does."""
        with self._guard:
            for fault in self._all:
                if isinstance(fault, kind) and not fault.spent and fault.goes_for(target):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.strike()
                    return fault
        return None

    def armed(self) -> list[WireFault]:
        """The faults on the wire that may strike."""
        with self._guard:
            return [f for f in self._all if isinstance(f, WireFault) and not f.spent]

    def strike(self, fault: WireFault) -> bool:
        """Whether a fault on the wire strikes here and now, and no other connection was first."""
        with self._guard:
            if fault.spent or fault not in self._all:
                return False
            fault.strike()
            return True

    def passes(self, fault: WireFault) -> bool:
        """Whether a request that matches is one of those that the fault lets pass."""
        with self._guard:
            if not fault.skip:
                return False
            fault.skip -= 1
            return True

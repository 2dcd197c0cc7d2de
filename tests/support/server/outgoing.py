"""What a reader session has still to send of its answers. Without I/O."""

from __future__ import annotations

from collections.abc import Iterator

from hyperframe.frame import ContinuationFrame, HeadersFrame

from tests.support.server.answers import Answer


class Outgoing:
    """An answer on its way: what is left of its body."""

    def __init__(self, answer: Answer) -> None:
        self.reset = answer.reset
        self._pieces: Iterator[bytes] = answer.pieces()
        self._piece = memoryview(next(self._pieces, b""))

    @property
    def done(self) -> bool:
        return not self._piece

    def take(self, size: int) -> tuple[bytes, bool]:
        """At most `size` bytes, at least one unless it is done already; and whether it is done now."""
        taken, self._piece = self._piece[:size], self._piece[size:]
        if not self._piece:
            self._piece = memoryview(next(self._pieces, b""))
        return bytes(taken), self.done


def endless_headers(stream: int, start: bytes) -> Iterator[bytes]:
    """A header block whose last frame never comes."""
    yield HeadersFrame(stream, start).serialize()
    field = b"\x00\x01x\x7e" + b"a" * 126  # a literal that is not indexed: `x: aaa…`
    frame = ContinuationFrame(stream, field * 120).serialize()
    while True:
        yield frame

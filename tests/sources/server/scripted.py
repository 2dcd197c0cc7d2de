"""Frames that a server could send, and a client's protocol core to feed with them. Without I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from hpack import Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from pbsfs.base.errors import PbsfsError
from pbsfs.sources.server.limits import DEFAULT, ServerLimits
from pbsfs.sources.server.protocol import ReaderProtocol, Response

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

Done = list[tuple[int, Response | PbsfsError]]


def headers(
    stream: int, *fields: tuple[str, str], status: str = "200", end: bool = False, pieces: int = 1
) -> bytes:
    """An answer's header block; in so many frames."""
    # An encoder of its own, without a table: blocks are good in any order.
    encoder = Encoder()
    encoder.header_table_size = 0
    block = encoder.encode([(":status", status), *fields] if status else list(fields))
    cut = max(1, -(-len(block) // pieces))
    parts = [block[at : at + cut] for at in range(0, len(block), cut)]
    first = HeadersFrame(stream, parts[0], flags=["END_STREAM"] if end else [])
    frames: list[Frame] = [first, *(ContinuationFrame(stream, part) for part in parts[1:])]
    frames[-1].flags.add("END_HEADERS")
    return b"".join(frame.serialize() for frame in frames)


def data(stream: int, body: bytes = b"", *, end: bool = False, padding: int | None = None) -> bytes:
    frame = DataFrame(stream, body, flags=["END_STREAM"] if end else [])
    if padding is not None:
        frame.flags.add("PADDED")
        frame.pad_length = padding
    return frame.serialize()


def reset(stream: int, code: int = 2) -> bytes:
    return RstStreamFrame(stream, code).serialize()


def goaway(last_stream: int = 0, code: int = 0) -> bytes:
    return GoAwayFrame(0, last_stream, code, b"words").serialize()


def settings(**values: int) -> bytes:
    names = {"max_frame": 5, "window": 4, "streams": 3, "table": 1}
    return SettingsFrame(0, settings={names[name]: value for name, value in values.items()}).serialize()


def ping(payload: bytes = b"12345678", *, answer: bool = False) -> bytes:
    return PingFrame(0, payload, flags=["ACK"] if answer else []).serialize()


def window_update(stream: int, size: int) -> bytes:
    return WindowUpdateFrame(stream, size).serialize()


def raw(kind: int, flags: int, stream: int, payload: bytes, *, length: int | None = None) -> bytes:
    """A frame of any type; `length`: what its header says, if that is not the truth."""
    told = len(payload) if length is None else length
    return told.to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def frames_of(sent: bytes) -> Iterator[Frame]:
    """The frames that a client sent."""
    view = memoryview(sent.removeprefix(PREFACE))
    while view:
        frame, length = Frame.parse_frame_header(view[:9])
        frame.parse_body(view[9 : 9 + length])
        view = view[9 + length :]
        yield frame


def feed(protocol: ReaderProtocol, received: bytes, cuts: Iterable[int] = ()) -> Done:
    """What is complete once `received` was, which arrives in pieces of the sizes `cuts` and then at once."""
    done: Done = []
    view = memoryview(received)
    sizes = iter(cuts)
    while view:
        piece = view[: next(sizes, len(view))]
        view = view[len(piece) :]
        while piece:
            target = protocol.target()
            count = min(len(target), len(piece))
            assert count > 0
            target[:count] = piece[:count]
            piece = piece[count:]
            done += protocol.received(count)
    return done


def asked(
    count: int = 1, limits: ServerLimits = DEFAULT, *, limit: int = 1 << 20, upfront: bytes = b""
) -> ReaderProtocol:
    """A protocol with `count` requests under way, streams 1, 3, 5 …, past the first exchange of settings."""
    protocol = ReaderProtocol(limits)
    assert feed(protocol, settings() + raw(4, 1, 0, b"") + upfront) == []
    for number in range(count):
        assert protocol.request(f"/chunk?digest={number:064x}", limit) == 2 * number + 1
    protocol.outgoing()
    return protocol


def bodies(done: Sequence[tuple[int, Response | PbsfsError]]) -> dict[int, bytes]:
    """The bodies of good answers, by stream; there may be nothing else."""
    found = {}
    for stream, result in done:
        assert isinstance(result, Response), result
        assert result.status == 200
        assert stream not in found
        found[stream] = bytes(result.body)
    return found

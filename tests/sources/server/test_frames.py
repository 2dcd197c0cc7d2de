"""Frames: cut out of whatever arrives, chunk data received into its place, no length believed."""

from __future__ import annotations

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.exceptions import FrameTooLargeError, ProtocolError
from hyperframe.exceptions import HyperframeError
from hyperframe.frame import DataFrame, Frame, HeadersFrame, PingFrame
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.sources.server.frames import (
    MAX_CONTROL_FRAME_SIZE,
    MAX_FRAME_SIZE,
    Frames,
    QuietDataFrame,
    install,
)
from tests.sources.server.scripted import data, headers, ping, raw, reset, settings


def received(frames: Frames, arriving: bytes, sizes: list[int] | None = None) -> list[Frame]:
    """The frames in `arriving`, which comes in pieces of these sizes and then at once."""
    found = []
    left = list(sizes or [])
    while arriving:
        target = frames.target()
        assert len(target) > 0
        count = min(len(target), len(arriving), left.pop(0) if left else len(arriving))
        target[:count] = arriving[:count]
        arriving = arriving[count:]
        complete = frames.advance(count)
        new = list(frames)
        assert complete or not new
        found += new
    return found


def test_a_frame_is_complete_with_its_last_byte_and_not_before() -> None:
    frames = Frames()
    text = ping()
    for byte in text[:-1]:
        frames.target()[:1] = bytes([byte])
        assert not frames.advance(1)
        assert list(frames) == []
    frames.target()[:1] = text[-1:]
    assert frames.advance(1)
    (frame,) = frames
    assert isinstance(frame, PingFrame)
    assert frame.opaque_data == b"12345678"


def test_a_frame_without_a_payload_is_complete_with_its_header() -> None:
    (frame,) = received(Frames(), data(5, end=True))
    assert isinstance(frame, DataFrame)
    assert (frame.stream_id, len(frame.data), "END_STREAM" in frame.flags) == (5, 0, True)


def test_data_is_received_into_its_place_and_never_copied() -> None:
    frames = Frames()
    header, body = data(3, bytes(range(256)))[:9], bytes(range(256))
    frames.target()[:] = header
    frames.advance(9)
    place = frames.target()
    place[:] = body
    assert frames.advance(len(body))

    (frame,) = frames

    assert isinstance(frame, QuietDataFrame)
    found: object = frame.data
    assert isinstance(found, memoryview)
    assert found.obj is place.obj
    assert bytes(found) == body
    assert frame.flow_controlled_length == 256


def test_data_is_received_where_its_stream_wants_it_and_padded_data_is_not() -> None:
    wanted: list[tuple[int, int]] = []
    place = memoryview(bytearray(10))

    def choose(stream_id: int, length: int) -> memoryview | None:
        wanted.append((stream_id, length))
        return place[4 : 4 + length] if stream_id == 3 else None

    found = received(Frames(choose), data(3, b"abc") + data(5, b"de") + data(3, b"xy", padding=2) + ping())

    assert wanted == [(3, 3), (5, 2)]
    assert bytes(place) == b"\0\0\0\0abc\0\0\0"
    assert [bytes(frame.data) for frame in found if isinstance(frame, DataFrame)] == [b"abc", b"de", b"xy"]


def test_the_largest_frames_are_taken_and_none_that_is_larger_has_memory_made_for_it() -> None:
    for kind, most in ((0, MAX_FRAME_SIZE), (1, MAX_CONTROL_FRAME_SIZE), (9, MAX_CONTROL_FRAME_SIZE)):
        frames = Frames()
        frames.target()[:] = raw(kind, 0, 1, b"", length=most)
        assert not frames.advance(9)
        assert len(frames.target()) == most
        for length in (most + 1, 0xFFFFFF):
            frames = Frames()
            frames.target()[:] = raw(kind, 0, 1, b"", length=length)
            with pytest.raises(FrameTooLargeError, match=f"{length} bytes where {most}"):
                frames.advance(9)


def test_data_without_a_stream_breaks_the_protocol() -> None:
    with pytest.raises(ProtocolError, match="without a stream"):
        received(Frames(), raw(0, 0, 0, b"abc"))


def test_the_reserved_bit_of_a_stream_is_not_looked_at() -> None:
    (frame,) = received(Frames(), raw(0, 0, 0x80000007, b"abc"))
    assert frame.stream_id == 7


@pytest.mark.parametrize("payload", [b"", b"\x05abc", b"\xff" + b"x" * 10])
def test_padding_that_is_longer_than_its_frame_is_refused(payload: bytes) -> None:
    with pytest.raises(HyperframeError):
        received(Frames(), raw(0, 0x8, 1, payload))


def test_a_header_block_in_pieces_comes_out_whole() -> None:
    whole = headers(1, ("content-type", "text/plain"), ("x", "y" * 100))
    (expected,) = received(Frames(), whole)
    (frame,) = received(Frames(), headers(1, ("content-type", "text/plain"), ("x", "y" * 100), pieces=5))
    assert isinstance(frame, HeadersFrame)
    assert isinstance(expected, HeadersFrame)
    assert frame.data == expected.data
    assert "END_HEADERS" in frame.flags


def test_nothing_comes_between_the_pieces_of_a_header_block() -> None:
    block = headers(1, ("x", "y" * 100), pieces=2)
    first = 9 + int.from_bytes(block[:3], "big")
    for between in (ping(), data(1, b"x"), headers(3), raw(9, 4, 3, b"")):
        with pytest.raises(ProtocolError, match="during header block"):
            received(Frames(), block[:first] + between)


class Untouchable(bytes):
    """Data that nobody may format."""

    def __repr__(self) -> str:
        raise AssertionError("was formatted")

    __str__ = __repr__
    hex = __repr__  # type: ignore[assignment]


def test_a_frame_of_data_does_not_format_it() -> None:
    frame = QuietDataFrame(3)
    frame.data = Untouchable(b"secret of some bytes")
    assert repr(frame) == "DataFrame(stream_id=3, 20 bytes)"
    assert "secret" not in f"{frame}"


def test_a_connection_takes_its_frames_from_here() -> None:
    connection = H2Connection(H2Configuration(client_side=True))
    frames = install(connection, lambda _stream_id, _length: None)
    assert connection.incoming_buffer is frames
    frames.add_data(b"what h2 hands over is here already")
    assert list(frames) == []


FRAME = st.one_of(
    st.builds(data, st.integers(1, 9), st.binary(max_size=40), end=st.booleans()),
    st.builds(
        data, st.integers(1, 9), st.binary(max_size=40), end=st.booleans(), padding=st.integers(0, 255)
    ),
    st.builds(headers, st.integers(1, 9)),
    st.builds(ping, st.binary(min_size=8, max_size=8)),
    st.builds(reset, st.integers(1, 9), st.integers(0, 13)),
    st.builds(lambda size: settings(window=size), st.integers(0, 1 << 30)),
    st.builds(raw, st.integers(11, 255), st.integers(0, 255), st.integers(0, 9), st.binary(max_size=20)),
)


@given(st.lists(FRAME, max_size=8), st.lists(st.integers(1, 30), max_size=40))
def test_frames_are_what_hyperframe_reads_wherever_they_are_cut(texts: list[bytes], sizes: list[int]) -> None:
    found = received(Frames(), b"".join(texts), sizes)

    assert len(found) == len(texts)
    for frame, text in zip(found, texts, strict=True):
        expected, _length = Frame.parse_frame_header(memoryview(text[:9]))
        expected.parse_body(memoryview(text[9:]))
        assert (frame.type, frame.stream_id) == (expected.type, expected.stream_id)
        if isinstance(expected, DataFrame):
            assert isinstance(frame, DataFrame)
            assert bytes(frame.data) == expected.data
            assert ("END_STREAM" in frame.flags) == ("END_STREAM" in expected.flags)
            assert frame.flow_controlled_length == expected.flow_controlled_length
        else:
            assert frame.serialize() == expected.serialize()


@given(st.binary(max_size=200))
def test_garbage_is_frames_or_a_broken_protocol(garbage: bytes) -> None:
    frames = Frames()
    try:
        for frame in received(frames, garbage):
            assert isinstance(frame, Frame)
    except (ProtocolError, HyperframeError):
        pass

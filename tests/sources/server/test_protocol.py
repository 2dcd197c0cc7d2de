"""The reader protocol on scripted frames: right answers wherever they are cut, and bounded trouble."""

from __future__ import annotations

import contextlib
import random
import tracemalloc

import hyperframe.frame
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import RequestReceived
from hyperframe.frame import (
    Frame,
    GoAwayFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.base.errors import ConnectError, DamageError
from pbsfs.sources.server.frames import MAX_CONTROL_FRAME_SIZE, MAX_FRAME_SIZE
from pbsfs.sources.server.limits import DEFAULT, ServerLimits
from pbsfs.sources.server.protocol import (
    LEAST_GROWTH,
    MAX_ERROR_BODY,
    MAX_STREAMS,
    ReaderProtocol,
    RefusedStreamError,
    Response,
)
from tests.sources.server.scripted import (
    PREFACE,
    asked,
    bodies,
    data,
    feed,
    frames_of,
    goaway,
    headers,
    ping,
    raw,
    reset,
    settings,
    window_update,
)

MIB = 1 << 20


def sent(protocol: ReaderProtocol) -> list[Frame]:
    return list(frames_of(protocol.outgoing()))


# --- what is sent


def test_it_opens_with_large_windows_and_frames_and_refuses_pushes() -> None:
    opening = ReaderProtocol().outgoing()

    assert opening.startswith(PREFACE)
    first, second = frames_of(opening)
    assert isinstance(first, SettingsFrame)
    assert first.settings[SettingsFrame.INITIAL_WINDOW_SIZE] == DEFAULT.window == 2**31 - 2
    assert first.settings[SettingsFrame.MAX_FRAME_SIZE] == MAX_FRAME_SIZE == 4 * MIB
    assert first.settings[SettingsFrame.ENABLE_PUSH] == 0
    assert isinstance(second, WindowUpdateFrame)
    assert (second.stream_id, second.window_increment) == (0, DEFAULT.window - 65535)


def test_a_server_reads_the_requests_as_they_are_meant() -> None:
    server = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
    server.initiate_connection()
    client = ReaderProtocol()
    paths = ["/download?file-name=index.json.blob", "/chunk?digest=" + "0f" * 32]

    numbers = [client.request(path, 100) for path in paths]
    events = server.receive_data(client.outgoing())

    requests = [event for event in events if isinstance(event, RequestReceived)]
    assert [request.stream_id for request in requests] == numbers == [1, 3]
    for request, path in zip(requests, paths, strict=True):
        assert [(str(name), str(value)) for name, value in request.headers or []] == [
            (":method", "GET"),
            (":scheme", "http"),
            (":authority", "localhost"),
            (":path", path),
        ]
        assert request.stream_ended is not None
    assert client.outgoing() == b""


def test_a_real_peer_is_understood() -> None:
    server = H2Connection(H2Configuration(client_side=False))
    server.initiate_connection()
    client = ReaderProtocol()
    number = client.request("/speedtest", 4 * MIB)
    server.receive_data(client.outgoing())
    server.send_headers(number, [(":status", "200"), ("content-length", str(4 * MIB))])
    assert server.max_outbound_frame_size == 4 * MIB
    server.send_data(number, b"A" * (4 * MIB), end_stream=True)

    assert bodies(feed(client, server.data_to_send())) == {1: b"A" * (4 * MIB)}

    server.receive_data(client.outgoing())  # the settings are acknowledged, and nothing is wrong
    assert not client.busy


# --- answers


def test_an_answer_is_complete_with_its_last_byte_and_no_earlier() -> None:
    protocol = asked()
    text = headers(1, ("content-length", "5")) + data(1, b"he") + data(1, b"llo", end=True)

    assert feed(protocol, text[:-1], [1] * len(text)) == []
    assert protocol.busy
    assert feed(protocol, text[-1:]) == [(1, Response(200, b"hello"))]
    assert not protocol.busy


def test_two_answers_come_out_right_wherever_the_bytes_are_cut() -> None:
    text = (
        headers(3, ("content-length", "4"), pieces=3)
        + data(3, b"ab", padding=3)
        + ping()
        + headers(1)
        + data(3)
        + data(1, b"one")
        + data(3, b"cd", end=True)
        + data(1, end=True)
    )
    for at in range(len(text) + 1):
        assert bodies(feed(asked(2), text, [at] if at else [])) == {1: b"one", 3: b"abcd"}


@given(st.data())
def test_answers_come_out_right_in_any_order_and_cut_anywhere(draw: st.DataObject) -> None:
    count = draw.draw(st.integers(1, 5))
    expected = {}
    scripts = []
    for number in range(count):
        stream = 2 * number + 1
        parts = draw.draw(st.lists(st.binary(max_size=60), max_size=4))
        expected[stream] = b"".join(parts)
        length = [("content-length", str(len(expected[stream])))] if draw.draw(st.booleans()) else []
        script = [headers(stream, *length, ("x", "y" * 40), pieces=draw.draw(st.integers(1, 4)))]
        for part in parts:
            padding = draw.draw(st.none() | st.integers(0, 20))
            script.append(data(stream, part, padding=padding))
        script.append(data(stream, end=True))
        scripts.append(script)
    stray = [ping(), settings(window=1000), window_update(0, 5), raw(0xBE, 7, 0, b"unknown")]
    scripts.append(draw.draw(st.lists(st.sampled_from(stray), max_size=3)))
    order = [index for index, script in enumerate(scripts) for _frame in script]
    text = b"".join(scripts[index].pop(0) for index in draw.draw(st.permutations(order)))
    cuts = draw.draw(st.lists(st.integers(1, 80), max_size=30))

    protocol = asked(count)

    assert bodies(feed(protocol, text, cuts)) == expected
    assert not protocol.busy


def test_an_answer_may_have_no_body() -> None:
    assert bodies(feed(asked(), headers(1, end=True))) == {1: b""}


def test_empty_frames_of_data_are_taken() -> None:
    text = headers(1) + data(1) + data(1, padding=0) + data(1, b"x") + data(1) + data(1, end=True)
    assert bodies(feed(asked(), text)) == {1: b"x"}


def test_a_body_is_put_together_from_frames_of_all_sizes() -> None:
    source = random.Random(4)
    parts = [source.randbytes(size) for size in (1, 5000, 2, 3, 4096, 4095, 1, 1, 70_000, 9, 0, 4096)]
    text = headers(1) + b"".join(data(1, part) for part in parts) + data(1, end=True)
    assert bodies(feed(asked(), text)) == {1: b"".join(parts)}


def test_a_body_of_known_length_stays_where_it_was_received() -> None:
    parts = [bytes(range(256)) * 4096, bytes(range(255, -1, -1)) * 1024, b"end"]
    size = sum(map(len, parts))
    protocol = asked(limit=size)
    feed(protocol, headers(1, ("content-length", str(size))) + data(1, parts[0])[:9])
    place = protocol.target()

    done = feed(protocol, data(1, parts[0])[9:] + data(1, parts[1], padding=3) + data(1, parts[2], end=True))

    ((number, answer),) = done
    assert isinstance(answer, Response)
    assert isinstance(answer.body, memoryview)
    assert answer.body.obj is place.obj
    assert answer.body.readonly
    assert (number, bytes(answer.body)) == (1, b"".join(parts))


def test_an_answer_of_which_nothing_has_come_takes_no_memory() -> None:
    protocol = asked(limit=MIB)
    peak, _taken = peak_of(protocol, headers(1, ("content-length", str(MIB))), data(1), 1)
    assert peak < MIB // 2


def test_a_frame_that_is_longer_than_its_body_breaks_the_connection() -> None:
    protocol = asked()
    with pytest.raises(ConnectError, match="broke the protocol"):
        feed(protocol, headers(1, ("content-length", "5")) + data(1, b"123") + data(1, b"456", end=True))


def test_a_frame_of_4_mib_is_taken_and_a_larger_one_breaks_the_connection() -> None:
    body = random.Random(1).randbytes(4 * MIB)
    assert bodies(feed(asked(limit=4 * MIB), headers(1) + data(1, body, end=True))) == {1: body}

    protocol = asked(limit=8 * MIB)
    with pytest.raises(ConnectError, match="FrameTooLargeError"):
        feed(protocol, headers(1) + raw(0, 0, 1, b"", length=4 * MIB + 1))


def test_interim_answers_and_trailers_are_no_answers() -> None:
    text = (
        headers(1, status="103")
        + headers(1)
        + data(1, b"x")
        + headers(1, ("digest", "abc"), status="", end=True)
    )
    assert bodies(feed(asked(), text)) == {1: b"x"}


@pytest.mark.parametrize("status", ["400", "401", "404", "500", "204"])
def test_other_answers_come_with_their_status_and_text(status: str) -> None:
    done = feed(asked(), headers(1, status=status) + data(1, b"why", end=True))
    assert done == [(1, Response(int(status), b"why"))]


@pytest.mark.parametrize("status", ["2000", "abc", "-20", "99999999999999999999"])
def test_a_status_that_makes_no_sense_is_no_success(status: str) -> None:
    try:
        ((_stream, result),) = feed(asked(), headers(1, status=status) + data(1, b"x", end=True))
    except ConnectError:
        return
    assert isinstance(result, Response)
    assert result.status == 0


# --- limits


def test_a_body_is_as_long_as_its_limit_and_no_longer() -> None:
    protocol = asked(2, limit=10)
    text = headers(1) + data(1, b"x" * 10, end=True) + headers(3, ("content-length", "10"))
    assert bodies(feed(protocol, text + data(3, b"y" * 10, end=True))) == {1: b"x" * 10, 3: b"y" * 10}


def test_an_announced_body_above_the_limit_is_refused_before_it_comes() -> None:
    protocol = asked(2, limit=10)

    ((stream, result),) = feed(protocol, headers(1, ("content-length", "11")))

    assert stream == 1
    assert isinstance(result, DamageError)
    assert str(result) == "the server sends 11 bytes where 10 bytes are the most"
    (cancel,) = sent(protocol)
    assert isinstance(cancel, RstStreamFrame)
    assert (cancel.stream_id, cancel.error_code) == (1, 8)
    # What is on its way already is nobody's, and the connection goes on.
    rest = data(1, b"x" * 11, end=True) + headers(3) + data(3, b"ok", end=True)
    assert bodies(feed(protocol, rest)) == {3: b"ok"}


def test_a_body_that_grows_above_the_limit_is_refused_when_it_does() -> None:
    protocol = asked(2, limit=10)

    assert feed(protocol, headers(1) + data(1, b"x" * 10)) == []
    ((stream, result),) = feed(protocol, data(1, b"x"))

    assert stream == 1
    assert isinstance(result, DamageError)
    assert str(result) == "the server sends more where 10 bytes are the most"
    assert [type(frame) for frame in sent(protocol)] == [RstStreamFrame]
    rest = data(1, b"x" * 100) + headers(3) + data(3, b"ok", end=True)
    assert bodies(feed(protocol, rest)) == {3: b"ok"}


def test_of_an_endless_error_as_much_is_read_as_is_shown() -> None:
    protocol = asked(2, limit=4)
    text = b"e" * 1000

    done = feed(protocol, headers(1, status="500") + b"".join(data(1, text) for _ in range(100)))

    ((stream, result),) = done
    assert (stream, result) == (1, Response(500, b"e" * MAX_ERROR_BODY))
    assert any(isinstance(frame, RstStreamFrame) for frame in sent(protocol))
    assert bodies(feed(protocol, headers(3) + data(3, b"ok", end=True))) == {3: b"ok"}


@pytest.mark.parametrize(
    "text",
    [
        headers(1, ("content-length", "5")) + data(1, b"1234", end=True),
        headers(1, ("content-length", "5")) + data(1, b"123456", end=True),
        headers(1, ("content-length", "-5")) + data(1, b"12345", end=True),
        headers(1, ("content-length", "five")) + data(1, b"12345", end=True),
        headers(1, ("content-length", "9" * 5000)),
        headers(1, ("content-length", "5"), ("content-length", "6")) + data(1, b"12345", end=True),
    ],
)
def test_a_length_that_is_not_kept_breaks_the_connection(text: bytes) -> None:
    with pytest.raises(ConnectError, match="broke the protocol"):
        feed(asked(), text)


@pytest.mark.parametrize(
    "end",
    [
        headers(1, ("content-length", "5"), end=True),
        headers(1, ("content-length", "5")) + headers(1, ("x", "y"), status="", end=True),
        headers(1, ("content-length", "5")) + data(1, b"1234") + headers(1, ("x", "y"), status="", end=True),
    ],
)
def test_an_answer_without_all_of_its_body_is_no_answer(end: bytes) -> None:
    protocol = asked(2)
    ((stream, result),) = feed(protocol, end)
    assert stream == 1
    assert isinstance(result, ConnectError)
    assert "of 5 bytes" in str(result)
    assert bodies(feed(protocol, headers(3) + data(3, b"ok", end=True))) == {3: b"ok"}


# --- flow


def test_windows_are_filled_up_again_by_what_arrived_and_rarely() -> None:
    protocol = asked(2, ServerLimits(acknowledge_after=1000))

    feed(protocol, headers(1) + headers(3) + data(1, b"x" * 600) + data(3, b"x" * 100, padding=98))
    assert sent(protocol) == []  # 799 bytes: padding counts, and its length too

    feed(protocol, data(3, b"x" * 201))
    (update,) = sent(protocol)
    assert isinstance(update, WindowUpdateFrame)
    assert (update.stream_id, update.window_increment) == (0, 1000)

    feed(protocol, data(1, b"x" * 999))
    assert sent(protocol) == []


def test_more_than_the_window_can_be_received_in_all() -> None:
    # As if the window were small: what is acknowledged has to let the server go on for ever.
    protocol = asked(40, ServerLimits(window=100_000, acknowledge_after=30_000))
    for number in range(40):
        stream = 2 * number + 1
        assert bodies(feed(protocol, headers(stream) + data(stream, b"x" * 10_000, end=True)))
    increments = [frame.window_increment for frame in sent(protocol) if isinstance(frame, WindowUpdateFrame)]
    assert sum(increments) >= 400_000 - 100_000


def test_more_than_the_window_breaks_the_connection() -> None:
    with pytest.raises(ConnectError, match="FlowControlError"):
        feed(asked(1, ServerLimits(window=70_000)), headers(1) + data(1, b"x" * 70_001))


def test_settings_are_acknowledged_and_pings_answered() -> None:
    protocol = ReaderProtocol()
    protocol.outgoing()

    feed(protocol, settings(max_frame=1 << 20, window=5) + ping(b"who are?"))

    acknowledgement, pong = sent(protocol)
    assert isinstance(acknowledgement, SettingsFrame)
    assert "ACK" in acknowledgement.flags
    assert isinstance(pong, PingFrame)
    assert "ACK" in pong.flags
    assert pong.opaque_data == b"who are?"


def test_frames_of_kinds_that_nobody_knows_are_passed_over() -> None:
    unknown = raw(0x77, 0xFF, 1, b"?" * 100) + raw(0xFE, 0, 0, b"")
    assert bodies(feed(asked(), unknown + headers(1) + unknown + data(1, b"x", end=True))) == {1: b"x"}


# --- ends


def test_an_answer_that_is_broken_off_fails_by_itself() -> None:
    protocol = asked(2)

    done = feed(protocol, headers(1) + data(1, b"abc") + reset(1, 2))

    ((stream, result),) = done
    assert stream == 1
    assert isinstance(result, ConnectError)
    assert result.retryable
    assert "broke off an answer" in str(result)
    assert bodies(feed(protocol, headers(3) + data(3, b"ok", end=True))) == {3: b"ok"}


@pytest.mark.parametrize("code", [0, 1, 11, 4_000_000_000])
def test_a_connection_that_the_server_ends_is_of_no_more_use(code: int) -> None:
    protocol = asked(2)
    with pytest.raises(ConnectError, match="ends the connection"):
        feed(protocol, goaway(3, code))
    with pytest.raises(ConnectError, match="no more requests"):
        protocol.request("/speedtest", 10)


def test_answers_before_the_end_are_kept() -> None:
    protocol = asked(2)
    assert bodies(feed(protocol, headers(1) + data(1, b"x", end=True))) == {1: b"x"}
    with pytest.raises(ConnectError):
        feed(protocol, goaway(1))


def test_what_nobody_waits_for_any_more_is_called_off_and_passed_over() -> None:
    protocol = asked(3)
    feed(protocol, headers(1) + data(1, b"abc"))

    protocol.cancel(1)
    protocol.cancel(3)
    protocol.cancel(3)
    protocol.cancel(99)

    resets = sent(protocol)
    assert [(frame.stream_id, type(frame)) for frame in resets] == [(1, RstStreamFrame), (3, RstStreamFrame)]
    late = data(1, b"x" * 5000, end=True) + headers(3) + data(3, b"late", end=True) + reset(1)
    assert feed(protocol, late) == []
    assert protocol.busy
    assert bodies(feed(protocol, headers(5) + data(5, b"ok", end=True))) == {5: b"ok"}
    assert not protocol.busy


def test_calling_off_on_a_connection_that_has_ended_is_nothing() -> None:
    protocol = asked()
    with pytest.raises(ConnectError):
        feed(protocol, goaway())
    protocol.cancel(1)
    assert not protocol.busy


def test_there_is_room_for_as_many_requests_as_the_server_allows_and_for_no_more() -> None:
    protocol = ReaderProtocol()
    assert protocol.room == 0  # nothing is known of the server
    feed(protocol, settings(streams=1))
    assert protocol.room == 1
    protocol.request("/speedtest", 10)
    assert protocol.room == 0
    with pytest.raises(ConnectError, match="no more requests"):
        protocol.request("/speedtest", 10)
    assert bodies(feed(protocol, headers(1) + data(1, b"x", end=True))) == {1: b"x"}
    assert protocol.room == 1


def test_a_limit_may_change_in_the_middle() -> None:
    protocol = asked(5)
    assert protocol.room == MAX_STREAMS - 5
    feed(protocol, settings(streams=3))
    assert protocol.room == -2
    protocol.cancel(1)
    feed(protocol, headers(3, end=True) + reset(5))
    assert protocol.room == 1
    feed(protocol, settings(streams=0))
    assert protocol.room == -2
    feed(protocol, settings(streams=1 << 20))
    assert protocol.room == MAX_STREAMS - 2


def test_a_request_that_the_server_refused_is_told_from_an_answer_that_was_broken_off() -> None:
    ((stream, result), (other, broken)) = feed(asked(3), reset(3, 7) + reset(5, 8))
    assert (stream, type(result)) == (3, RefusedStreamError)
    assert (other, type(broken)) == (5, ConnectError)


def test_a_ping_asks_and_its_answer_is_a_sign_of_life() -> None:
    protocol = asked()
    before = protocol.progress
    protocol.ping()
    (asks,) = sent(protocol)
    assert isinstance(asks, PingFrame)
    assert "ACK" not in asks.flags
    feed(protocol, ping(asks.opaque_data, answer=True))
    assert protocol.progress == before + 1


def test_asking_on_a_connection_that_has_ended_is_nothing() -> None:
    protocol = asked()
    with pytest.raises(ConnectError):
        feed(protocol, goaway())
    protocol.ping()


def test_it_is_known_which_answers_do_not_grow() -> None:
    protocol = asked()
    assert protocol.oldest == 0
    number = protocol.request("/speedtest", 10, now=5)
    for received in protocol_bytes(headers(1) + data(1, b"x")):
        protocol.target()[: len(received)] = received
        protocol.received(len(received), now=9)
    assert (protocol.oldest, protocol.overdue(9), protocol.overdue(10)) == (5, [number], [1, number])
    for received in protocol_bytes(data(number)):  # an empty frame
        protocol.target()[: len(received)] = received
        with contextlib.suppress(ConnectError):
            protocol.received(len(received), now=11)
    assert number in protocol.overdue(10)


def test_an_answer_that_grows_by_a_byte_now_and_then_does_not_grow() -> None:
    protocol = asked()
    feed_at(protocol, headers(1), now=1)
    for minute in range(100):
        feed_at(protocol, data(1, b"x"), now=60 * minute)
    assert protocol.overdue(2) == [1]
    feed_at(protocol, data(1, bytes(LEAST_GROWTH - 100)), now=7000)
    assert (protocol.overdue(7000), protocol.overdue(7001)) == ([], [1])


def feed_at(protocol: ReaderProtocol, text: bytes, now: float) -> None:
    while text:
        target = protocol.target()
        count = min(len(target), len(text))
        target[:count] = text[:count]
        text = text[count:]
        protocol.received(count, now=now)


def protocol_bytes(text: bytes) -> list[bytes]:
    return [text[at : at + 1] for at in range(len(text))]


# --- what no server should send


def push(stream: int) -> bytes:
    block = headers(2, ("x", "y"))[9:]
    return raw(5, 0x4, stream, (2).to_bytes(4, "big") + block)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(push(1), id="a push"),
        pytest.param(headers(7), id="an answer to a request that was not made"),
        pytest.param(headers(2), id="an answer on a stream of the server's own"),
        pytest.param(raw(1, 4, 0, headers(1)[9:]), id="an answer without a stream"),
        pytest.param(data(7, b"x"), id="data of a request that was not made"),
        pytest.param(data(1, b"x"), id="data before its headers"),
        pytest.param(raw(0, 0, 0, b"x"), id="data without a stream"),
        pytest.param(headers(1, end=True) + headers(1), id="an answer after its end"),
        pytest.param(headers(1) + headers(1), id="an answer in an answer"),
        pytest.param(headers(1, status=""), id="an answer without a status"),
        pytest.param(headers(1, ("UPPER", "x")), id="a name in capitals"),
        pytest.param(raw(1, 4, 1, b"\xff" * 40), id="headers that do not unpack"),
        pytest.param(raw(1, 0x28, 1, b"\x01"), id="headers that are cut off"),
        pytest.param(raw(9, 4, 1, b"x"), id="the rest of a block that was not begun"),
        pytest.param(raw(3, 0, 1, b"abc"), id="a reset that is too short"),
        pytest.param(raw(4, 0, 0, b"abc"), id="settings that are cut off"),
        pytest.param(raw(4, 0, 1, b""), id="settings of a stream"),
        pytest.param(raw(4, 0, 0, b"\x00\x05\x00\x00\x00\x01"), id="settings that are not allowed"),
        pytest.param(raw(6, 0, 0, b"1234567"), id="a ping that is too short"),
        pytest.param(raw(6, 0, 1, b"12345678"), id="a ping of a stream"),
        pytest.param(raw(7, 0, 0, b"abc"), id="a goodbye that is cut off"),
        pytest.param(window_update(0, 0x7FFFFFFF), id="a window beyond all bounds"),
        pytest.param(raw(8, 0, 0, b"\0\0\0\0"), id="a window that does not grow"),
        pytest.param(raw(0, 8, 1, b"\xffabc"), id="padding that is longer than its frame"),
        pytest.param(raw(6, 0, 0, b"", length=MAX_CONTROL_FRAME_SIZE + 1), id="a ping of 64 KiB and more"),
        pytest.param(raw(4, 0, 0, b"", length=0xFFFFFF), id="settings of 16 MiB"),
        pytest.param(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n", id="HTTP/1"),
        pytest.param(b"<!DOCTYPE html><html><head><title>Hello", id="a page"),
        pytest.param(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", id="SSH"),
        pytest.param(b"\xff" * 64, id="ones"),
        pytest.param(PREFACE, id="a client's preface"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_what_breaks_the_protocol_is_a_lost_connection(text: bytes, whole: bool) -> None:
    protocol = asked()
    with pytest.raises(ConnectError) as caught:
        feed(protocol, text, [] if whole else [1] * len(text))
    assert caught.value.retryable
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_the_end_of_a_request_that_was_not_made_is_nothing() -> None:
    text = reset(7) + headers(1) + data(1, b"x", end=True)
    assert bodies(feed(asked(), text)) == {1: b"x"}


def test_zeros_are_empty_frames_of_no_stream() -> None:
    with pytest.raises(ConnectError):
        feed(asked(), bytes(64))


@given(st.binary(max_size=300), st.booleans())
def test_garbage_is_a_lost_connection_or_nothing(garbage: bytes, started: bool) -> None:
    protocol = asked(2)
    if started:
        feed(protocol, headers(1) + data(1, b"x"))
    with contextlib.suppress(ConnectError):
        feed(protocol, garbage)
    protocol.outgoing()


@given(
    st.lists(
        st.builds(
            raw,
            st.integers(0, 11),
            st.integers(0, 255),
            st.sampled_from([0, 1, 2, 3, 5, 0x7FFFFFFF]),
            st.binary(max_size=60),
        ),
        max_size=8,
    )
)
def test_well_cut_garbage_is_a_lost_connection_or_an_answer(texts: list[bytes]) -> None:
    protocol = asked(2)
    try:
        for stream, _result in feed(protocol, headers(1) + b"".join(texts)):
            assert stream in (1, 3)
    except ConnectError:
        pass


@given(st.data())
def test_whatever_a_server_sends_between_our_requests_is_a_lost_connection_or_an_answer(
    draw: st.DataObject,
) -> None:
    numbers = st.sampled_from([0, 1, 16384, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1])
    streams = st.sampled_from([1, 3, 5])
    entry = st.builds(
        lambda name, value: name.to_bytes(2, "big") + value.to_bytes(4, "big"),
        *[st.sampled_from([1, 2, 3, 4, 5, 6, 8, 99]), numbers],
    )
    frames = st.one_of(
        st.builds(lambda entries: raw(4, 0, 0, b"".join(entries)), st.lists(entry, max_size=3)),
        st.builds(headers, streams, end=st.booleans(), status=st.sampled_from(["200", "103", "400", "x"])),
        st.builds(data, streams, st.binary(max_size=9), end=st.booleans(), padding=st.none() | st.just(3)),
        st.builds(reset, st.sampled_from([1, 3, 7]), st.sampled_from([0, 7, 8, 2**32 - 1])),
        st.builds(ping, answer=st.booleans()),
        st.builds(raw, st.integers(0, 16), st.integers(0, 255), st.integers(0, 9), st.binary(max_size=30)),
    )
    protocol = asked(2)
    try:
        for received in draw.draw(st.lists(frames, max_size=10)):
            feed(protocol, received)
            protocol.cancel(draw.draw(st.sampled_from([1, 3, 5, 99])))
            protocol.ping()
            if protocol.room > 0:
                protocol.request("/chunk", 10)
            protocol.outgoing()
    except ConnectError:
        pass


@given(st.data())
def test_a_flipped_bit_is_a_lost_connection_or_an_answer(draw: st.DataObject) -> None:
    text = bytearray(
        settings()
        + headers(1, ("content-length", "20"))
        + data(1, b"x" * 20, end=True)
        + headers(3, ("content-type", "application/octet-stream"), pieces=2)
        + data(3, b"y" * 20, padding=4, end=True)
    )
    bit = draw.draw(st.integers(0, 8 * len(text) - 1))
    text[bit // 8] ^= 1 << bit % 8
    with contextlib.suppress(ConnectError):
        for stream, result in feed(asked(2), bytes(text)):
            assert stream in (1, 3)
            assert isinstance(result, (Response, ConnectError))


def peak_of(protocol: ReaderProtocol, first: bytes, repeated: bytes, times: int) -> tuple[int, int]:
    """The memory that it takes at most to receive something many times, and how often it was taken."""
    feed(protocol, first)
    taken = 0
    tracemalloc.start()
    try:
        for _ in range(times):
            feed(protocol, repeated)
            taken += 1
    except ConnectError:
        pass
    finally:
        _size, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return peak, taken


def test_an_endless_header_block_ends_soon_and_costs_little() -> None:
    fragment = raw(9, 0, 1, b"\x00\x01x\x7e" + b"a" * (MAX_CONTROL_FRAME_SIZE - 4))
    begin = raw(1, 0, 1, headers(1)[9:])
    peak, taken = peak_of(asked(), begin, fragment, 1000)
    assert taken < 100
    assert peak < 8 * MIB


def test_a_header_block_that_unpacks_to_much_is_refused() -> None:
    # A field of 4000 bytes goes into the table, and is then named again and again.
    block = headers(1)[9:] + b"\x40\x01x" + b"\x7f\xa1\x1e" + b"a" * 4000 + b"\xbe" * 60_000
    with pytest.raises(ConnectError):
        feed(asked(), raw(1, 4, 1, block))


def test_a_body_of_tiny_frames_takes_no_more_than_its_size() -> None:
    protocol = asked(limit=MIB)
    peak, taken = peak_of(protocol, headers(1), data(1, b"x") * 100, 200)
    assert taken == 200
    assert peak < 400_000  # a list of 20,000 frames would take some megabytes
    assert bodies(feed(protocol, data(1, end=True))) == {1: b"x" * 20_000}


def test_empty_frames_without_end_take_nothing() -> None:
    peak, _taken = peak_of(asked(), headers(1), data(1) * 100, 200)
    assert peak < 400_000


def test_resets_pings_and_settings_without_end_take_nothing() -> None:
    protocol = asked()
    tracemalloc.start()
    try:
        for _ in range(100):
            feed(protocol, (ping() + settings(window=77) + window_update(1, 1)) * 20)
            protocol.outgoing()
        _size, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 400_000


# --- what must not cost


def test_chunk_data_is_never_formatted_for_a_log_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_hex(data: object) -> str:
        assert not data or len(bytes(data)) < 200  # type: ignore[call-overload]
        return "…"

    def refuse(_self: object) -> str:
        raise AssertionError("formatted")

    monkeypatch.setattr(hyperframe.frame, "_raw_data_repr", no_hex)
    monkeypatch.setattr(hyperframe.frame.DataFrame, "_body_repr", refuse, raising=False)

    assert bodies(feed(asked(), headers(1) + data(1, b"z" * 100_000, end=True))) == {1: b"z" * 100_000}


def test_the_goodbye_after_broken_frames_is_there_to_be_sent() -> None:
    protocol = asked()
    with pytest.raises(ConnectError):
        feed(protocol, headers(7))
    assert any(isinstance(frame, GoAwayFrame) for frame in sent(protocol))


# --- progress


def test_pings_and_empty_frames_are_no_progress() -> None:
    protocol = asked()
    feed(protocol, settings() + headers(1))
    before = protocol.progress
    feed(protocol, ping() + data(1) + window_update(0, 100))
    assert protocol.progress == before


def test_every_byte_of_data_is_progress_before_its_frame_is_complete_too() -> None:
    protocol = asked()
    before = protocol.progress
    feed(protocol, settings() + headers(1))
    assert protocol.progress == before + 1
    frame = data(1, b"x" * 50)
    feed(protocol, frame[:9])
    for received in range(1, 50):
        feed(protocol, frame[8 + received : 9 + received])
        assert protocol.progress == before + 1 + received

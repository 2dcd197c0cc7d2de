"""Connections that are kept, and answers that no server should give."""

from __future__ import annotations

import http.client
import io
import re
import socket
import tracemalloc
from collections import deque
from typing import Any, cast

import pytest
import trio

from pbsfs.base.errors import (
    ConnectError,
    DamageError,
    SourceError,
    WrongServerError,
)
from pbsfs.sources.http.client import read_bounded
from pbsfs.sources.http.limits import HttpLimits
from pbsfs.sources.http.watched import SlowError, Watched
from pbsfs.sources.server.limits import DEFAULT, ServerLimits
from tests.sources.server.asking import (
    GROUPS,
    Clock,
    api_of,
    failure,
    got,
    logins,
    peer_api,
    using,
)
from tests.sources.server.peers import Peer, Talk, request_of
from tests.sources.server.serving import CONFIG, FIRST, TOKEN
from tests.support.server import (
    EndlessHeaders,
    Hold,
    Huge,
    ReferenceServer,
    Stall,
    Status,
    Truncate,
    WrongLength,
)
from tests.support.server.certificate import Certificate
from tests.support.waiting import wait_until

# --- connections


def test_a_connection_is_kept_and_used_again(server: ReferenceServer) -> None:
    api = api_of(server)

    async def work() -> None:
        for _ in range(5):
            await api.get(GROUPS, {})
        assert server.open_connections == 1

    using(api, work)
    assert server.connections == 1
    wait_until(lambda: server.open_connections == 0, "closing")


def test_as_many_connections_are_kept_as_are_of_use(server: ReferenceServer) -> None:
    more = DEFAULT.kept_connections + 3
    api = api_of(server, TOKEN, threads=more)

    async def work() -> None:
        held = server.faults.add(Hold(match="/version", times=more))
        async with trio.open_nursery() as nursery:
            for _ in range(more):
                nursery.start_soon(api.get, "/version", {})
            await trio.to_thread.run_sync(wait_until, lambda: held.hits == more, "all requests")
            held.release()
        await trio.to_thread.run_sync(
            wait_until, lambda: server.open_connections == DEFAULT.kept_connections, "closing the others"
        )

    using(api, work)
    assert server.connections == more


def test_a_connection_that_was_idle_for_long_is_not_used_again(server: ReferenceServer) -> None:
    clock = Clock()
    api = api_of(server, TOKEN, clock=clock)

    async def work() -> None:
        await api.get("/version", {})
        clock.ahead = DEFAULT.keep_time - 5
        await api.get("/version", {})
        assert server.connections == 1
        clock.ahead += DEFAULT.keep_time + 1
        await api.get("/version", {})
        assert server.connections == 2

    using(api, work)


def test_a_server_may_close_connections_that_are_idle(server: ReferenceServer) -> None:
    api = api_of(server)

    async def work() -> None:
        for cut in (server.drop_connections, server.restart, server.drop_connections):
            await api.get("/version", {})
            await trio.to_thread.run_sync(cut)
        await api.get("/version", {})

    using(api, work)
    assert (server.requests.count("/version"), logins(server)) == (4, 1)


def test_a_server_that_is_down_may_come_back(server: ReferenceServer) -> None:
    api = api_of(server)

    async def work() -> None:
        await api.get("/version", {})
        await trio.to_thread.run_sync(server.go_down)
        with pytest.raises(ConnectError, match="Connection refused") as caught:
            await api.get("/version", {})
        assert caught.value.retryable
        await trio.to_thread.run_sync(server.come_back)
        assert await api.get("/version", {})

    using(api, work)
    assert logins(server) == 1


def test_a_server_that_goes_silent_is_given_up(server: ReferenceServer) -> None:
    server.faults.add(Stall(match="/version", after_bytes=10))
    api = api_of(server, TOKEN, limits=ServerLimits(request_timeout=0.1))
    assert "no answer for" in failure(api, ConnectError)


def test_an_answer_that_grows_too_slowly_is_given_up(server: ReferenceServer) -> None:
    server.faults.add(Huge(match="/version"))  # arrives in many parts
    api = api_of(server, TOKEN, limits=ServerLimits(slow_time=0, least_rate=1e18))
    text = failure(api, ConnectError)
    assert re.search(
        r": an answer is too slow, \d+ bytes in 0 s; check the network and the server, then", text
    )


class Pieces:
    """A socket that receives pieces of these sizes, at these times."""

    def __init__(self, *pieces: tuple[float, int]) -> None:
        self._pieces = deque(pieces)
        self.now = 0.0

    def makefile(self, mode: str, buffering: int) -> io.BytesIO:
        assert (mode, buffering) == ("rb", 0)
        return io.BytesIO()

    def recv_into(self, target: memoryview) -> int:
        self.now, count = self._pieces.popleft() if self._pieces else (self.now, 0)
        assert count <= len(target)
        return count


def received(pieces: Pieces) -> int:
    """How many bytes are received until the end, with limits of 60 seconds and 10 bytes a second."""
    limits = HttpLimits(slow_time=60, least_rate=10)
    with Watched(cast("socket.socket", pieces), limits, lambda: pieces.now) as watched:
        return sum(iter(lambda: watched.readinto(bytearray(1 << 20)), 0))


def test_a_server_may_need_long_to_begin_and_be_slow_for_a_moment() -> None:
    assert received(Pieces((1000, 1), (1059, 1), (1060, 598), (1119, 1), (1121, 700))) == 1301


def test_a_link_of_ten_bytes_a_second_is_not_too_slow() -> None:
    assert received(Pieces(*((second, 10) for second in range(1000)))) == 10_000
    assert received(Pieces(*((50 * part, 16 << 10) for part in range(10)))) == 160 << 10


def test_a_byte_a_second_is_too_slow_after_two_minutes_whatever_came_before() -> None:
    pieces = Pieces((0, 1 << 20), *((60 + second, 1) for second in range(1000)))
    with pytest.raises(SlowError) as caught:
        received(pieces)
    assert (caught.value.received, caught.value.seconds, pieces.now) == (60, 60, 180)


def test_a_byte_after_each_long_silence_is_too_slow() -> None:
    with pytest.raises(SlowError):
        received(Pieces(*((500 * second, 1) for second in range(1000))))


def test_a_short_end_after_a_long_silence_is_not_too_slow() -> None:
    assert received(Pieces((0, 150), (120, 11))) == 161


def test_a_stop_of_the_process_is_not_a_slow_answer() -> None:
    record = 16 << 10  # of TLS: no more is received at once
    assert received(Pieces((0, record), (7200, record), (7200, record), (7201, 1))) == 3 * record + 1


def test_a_connection_that_lies_idle_is_closed(server: ReferenceServer) -> None:
    api = api_of(server, TOKEN, limits=ServerLimits(keep_time=0.05))

    async def work() -> None:
        await api.get("/version", {})
        assert server.open_connections == 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.tidy)
            await trio.to_thread.run_sync(wait_until, lambda: server.open_connections == 0, "closed")
            await api.get("/version", {})  # and on a new one, which is closed too
            await trio.to_thread.run_sync(wait_until, lambda: server.open_connections == 0, "closed")
            nursery.cancel_scope.cancel()

    using(api, work)
    assert server.connections == 2


# --- what no server should answer


def test_an_answer_larger_than_its_limit_is_refused(server: ReferenceServer) -> None:
    query = {"backup-type": "vm", "backup-id": "100", "backup-time": str(FIRST.time)}
    query["file-name"] = CONFIG.filename
    path = "/admin/datastore/golden/download"
    api = api_of(server)

    async def work() -> None:
        whole = await api.download(path, query, 1 << 20)
        with pytest.raises(DamageError, match=f"more than {len(whole) - 1} bytes"):
            await api.download(path, query, len(whole) - 1)
        assert await api.download(path, query, len(whole)) == whole

    using(api, work)


@pytest.mark.parametrize("announce", [True, False])
def test_an_endless_answer_is_refused_and_not_read(server: ReferenceServer, announce: bool) -> None:
    server.faults.add(Huge(match="/version", announce=announce))
    api = api_of(server, TOKEN, limits=ServerLimits(max_list=1 << 20))

    async def work() -> None:
        with pytest.raises(DamageError, match="more than 1048576 bytes"):
            await api.get("/version", {})
        assert await api.get("/version", {})

    using(api, work)


class Announced:
    """An answer's body of `length` bytes, in pieces of at most 16 KiB."""

    def __init__(self, body: bytes) -> None:
        self.length = len(body)
        self._left = memoryview(body)

    def readinto(self, target: memoryview) -> int:
        count = min(len(target), len(self._left), 16 << 10)
        target[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def test_a_body_of_announced_length_is_received_into_its_place_and_not_copied() -> None:
    body = bytes(range(256)) * 4096
    answer = cast("http.client.HTTPResponse", Announced(body))
    tracemalloc.start()
    try:
        found = read_bounded(answer, len(body), lambda: None)
        _size, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(found, bytes)
    assert found == body
    assert peak < 1.1 * len(body)


class Lost(Announced):
    """An answer whose connection is lost after the first piece. `seen`: where the pieces should have gone."""

    def __init__(self, body: bytes) -> None:
        super().__init__(body)
        self.seen: list[memoryview] = []

    def readinto(self, target: memoryview) -> int:
        self.seen.append(target)
        if len(self.seen) > 1:
            raise ConnectionResetError
        return super().readinto(target)


def test_nothing_holds_the_place_of_a_body_that_does_not_come() -> None:
    """Python 3.13 writes to standard error that it could not close such a buffer."""
    answer = Lost(bytes(1 << 20))
    with pytest.raises(ConnectionResetError):
        read_bounded(cast("http.client.HTTPResponse", answer), 1 << 20, lambda: None)
    assert len(answer.seen) == 2
    for view in answer.seen:
        with pytest.raises(ValueError, match="released"):
            view.tobytes()


def test_an_endless_error_is_cut(server: ReferenceServer) -> None:
    class HugeError(Huge):
        def change(self, answer: Any) -> Any:
            return super().change(Status(status=500, text="broken ").change(answer))

    server.faults.add(HugeError(match="/version"))
    with pytest.raises(SourceError, match="status 500: broken") as caught:
        got(api_of(server, TOKEN))
    assert caught.value.retryable


def test_endless_headers_are_refused(server: ReferenceServer) -> None:
    server.faults.add(EndlessHeaders(match="/version"))
    assert "does not answer as a Proxmox Backup Server does" in failure(
        api_of(server, TOKEN), WrongServerError
    )


@pytest.mark.parametrize("fault", [WrongLength(by=1), WrongLength(by=1 << 40), Truncate(missing=3)])
def test_an_answer_that_breaks_off_is_a_lost_connection(
    server: ReferenceServer, fault: WrongLength | Truncate
) -> None:
    fault.match = GROUPS
    server.faults.add(fault)
    api = api_of(server, TOKEN)
    assert "closed before the answer was complete" in failure(api, ConnectError, GROUPS)
    assert got(api, GROUPS)


def test_an_answer_that_is_longer_than_announced_is_no_answer(server: ReferenceServer) -> None:
    server.faults.add(WrongLength(by=-1, match="/version"))
    api = api_of(server, TOKEN)
    assert "makes no sense" in failure(api, WrongServerError)
    assert got(api)


@pytest.mark.parametrize(
    "answer",
    [
        b'HTTP/1.1 200 OK\r\ndate: now\r\ncontent-length: 13\r\nserver: x\r\n\r\n{"data": [1]}',
        b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n7\r\n{"data"\r\n6\r\n: [1]}\r\n0\r\n\r\n',
    ],
)
def test_an_answer_that_breaks_off_at_any_byte_is_a_lost_connection(
    peer_certificate: Certificate, answer: bytes
) -> None:
    cuts = iter(range(len(answer) + 1))
    sent = iter(range(len(answer) + 1))

    def talk(connection: socket.socket) -> None:
        request_of(connection)
        connection.sendall(answer[: next(sent)])

    with Peer(peer_certificate, talk) as peer:
        for _ in zip(range(len(answer.rstrip())), cuts, strict=False):
            with pytest.raises(ConnectError, match="closed before the answer was complete"):
                got(peer_api(peer, peer_certificate))
        for _ in cuts:  # nothing is missing any more but ends of lines
            assert got(peer_api(peer, peer_certificate)) == [1]


def test_an_answer_that_nobody_asked_for_is_not_taken_for_the_next_one(peer_certificate: Certificate) -> None:
    good = b'{"data": "%d"}'

    def talk(connection: Any) -> None:
        first, smuggled = good % 1, good % 2
        head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n"
        while request_of(connection):
            connection.sendall(head % len(first) + first + head % len(smuggled) + smuggled)

    speaking: Talk = talk
    with Peer(peer_certificate, speaking) as peer:
        api = peer_api(peer, peer_certificate)

        async def work() -> None:
            assert await api.get("/version", {}) == "1"
            assert await api.get("/version", {}) == "1"

        using(api, work)

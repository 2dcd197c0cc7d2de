"""A session: as many requests at once as the server allows, and a silent server told from a dead one."""

from __future__ import annotations

import gc
import hashlib
import logging
import math
import time
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from pbsfs.base.errors import ConnectError
from pbsfs.base.names import ROOT_NAMESPACE
from pbsfs.formats.index import FixedIndex
from pbsfs.sources.pacing import Pacing
from pbsfs.sources.server import conversation, protocol
from pbsfs.sources.server.patience import Patience
from pbsfs.sources.server.protocol import MAX_STREAMS
from pbsfs.testing.writer import DatastoreWriter
from tests.sources.server import serving
from tests.sources.server.serving import CONTENT, IMAGE, STREAM, image_of, read_all, reading, source_of, until
from tests.support import made
from tests.support.server import Hold, ReferenceServer, Reset, Stall

KIB = 1 << 10
SNAPSHOT = made.snapshot("500")
CHUNKS = 300
"""More than any limit of requests at once."""

SHORT = 0.3
"""Seconds; what a test waits for comes after some of it."""


def content_of(chunk: int) -> bytes:
    """An image of `CHUNKS` chunks that all differ, and that compress well."""
    return b"".join(
        hashlib.sha256(number.to_bytes(4, "big")).digest() * (chunk // 32) for number in range(CHUNKS)
    )


@pytest.fixture(scope="module", params=[64, 128, 256])
def small_chunks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """A datastore with an image of small chunks; and their size."""
    size = request.param * KIB
    writer = DatastoreWriter(tmp_path_factory.mktemp(f"chunks{size}") / "datastore")
    content = content_of(size)
    writer.add_snapshot(SNAPSHOT, {IMAGE.filename: content, STREAM.filename: content}, chunk_size=size)
    return writer.path, size


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="pbsfs")


def retries(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if "trying again" in message]


# --- requests at once


@pytest.mark.parametrize("limit", [200, 10, 1, None])
def test_small_chunks_are_read_without_a_retry_whatever_the_server_allows_at_once(
    small_chunks: tuple[Path, int], caplog: pytest.LogCaptureFixture, limit: int | None
) -> None:
    path, size = small_chunks
    expected = content_of(size)

    async def main() -> None:
        async with reading(source_of(server)) as reader:
            for archive in (IMAGE, STREAM):
                image = await image_of(reader, SNAPSHOT, archive)
                found = b"".join(
                    [bytes(await image.read(at, 48 << 20)) for at in range(0, len(expected), 48 << 20)]
                )
                assert found == expected

    with serving.served(path) as server:
        server.sessions.max_streams = limit
        trio.run(main)
        (session,) = server.sessions.all()
    most = MAX_STREAMS if limit is None else min(limit, MAX_STREAMS)
    assert (session.refused, retries(caplog)) == (0, [])
    assert min(most, 10) <= session.peak <= most


def test_a_limit_that_is_lowered_in_the_middle_costs_nothing(
    server: ReferenceServer, caplog: pytest.LogCaptureFixture
) -> None:
    hold = server.faults.add(Hold(match="/chunk", times=None))

    async def main() -> None:
        async with reading(source_of(server)) as reader:
            image = await image_of(reader)

            chunks = {image.index.digest(number) for number in image.data_chunks(0, image.size)}

            async def lower() -> None:
                await until(lambda: hold.hits == len(chunks))  # what is sent later may be refused
                server.limit_streams(1)
                hold.release()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(lower)
                assert await read_all(image) == CONTENT
            assert await read_all(await image_of(reader, archive=STREAM)) == serving.STREAM_CONTENT

    trio.run(main)
    assert [session.refused for session in server.sessions.all()] == [0]
    assert retries(caplog) == []


def test_a_request_that_the_server_refuses_is_asked_again_on_the_same_session(
    server: ReferenceServer, caplog: pytest.LogCaptureFixture
) -> None:
    refused = server.faults.add(Reset(match="/chunk", code=7))

    async def main() -> None:
        async with reading(source_of(server)) as reader:
            assert await read_all(await image_of(reader)) == CONTENT

    trio.run(main)
    assert refused.hits == 1
    assert len(server.sessions.all()) == 1
    assert retries(caplog) == []


def test_a_server_that_refuses_for_ever_is_an_error_within_the_limit(
    server: ReferenceServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults.add(Reset(match="/chunk", code=7, times=None))

    async def main() -> None:
        async with reading(source_of(server, retry_timeout=SHORT)) as reader:
            with pytest.raises(ConnectError, match="refuses a request"):
                await read_all(await image_of(reader))

    trio.run(main)
    assert server.requests.count("/chunk") < 1000  # with pauses
    caplog.clear()


def test_a_server_that_allows_nothing_yet_is_waited_for(
    server: ReferenceServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.sessions.max_streams = 0

    async def main() -> None:
        async with reading(source_of(server)) as reader:

            async def allow() -> None:
                await until(server.open_sessions)
                server.limit_streams(2)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(allow)
                assert await read_all(await image_of(reader)) == CONTENT

    trio.run(main)
    (session,) = server.sessions.all()
    assert (session.peak, session.refused, retries(caplog)) == (2, 0, [])


def test_a_server_that_allows_nothing_for_long_is_given_up(
    server: ReferenceServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.sessions.max_streams = 0

    async def main() -> None:
        async with reading(source_of(server, retry_timeout=0, stall_timeout=SHORT)) as reader:
            with pytest.raises(ConnectError, match="allows no requests for"):
                await image_of(reader)

    trio.run(main)
    assert server.requests.count("/download?file-name=drive") == 0


def test_a_request_that_is_cancelled_while_it_waits_for_its_turn_is_never_sent(
    server: ReferenceServer,
) -> None:
    server.sessions.max_streams = 1

    async def main() -> None:
        async with reading(source_of(server)) as reader:
            sent = server.requests.count("/chunk")
            hold = server.faults.add(Hold(match="/chunk"))
            source = reader.source
            index = FixedIndex(await source.fetch_file(serving.FIRST, IMAGE, 1 << 20))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(source.fetch_chunk, serving.FIRST, IMAGE, index.digest(0), 1 << 20)
                await until(lambda: hold.hits)
                async with trio.open_nursery() as cancelled:
                    cancelled.start_soon(source.fetch_chunk, serving.FIRST, IMAGE, index.digest(1), 1 << 20)
                    await trio.testing.wait_all_tasks_blocked()
                    cancelled.cancel_scope.cancel()
                hold.release()
            await source.fetch_chunk(serving.FIRST, IMAGE, index.digest(0), 1 << 20)
            assert server.requests.count("/chunk") == sent + 2
            assert server.requests.count(index.digest(1).hex()) == 0

    trio.run(main)


# --- silence


def test_a_server_that_is_silent_and_answers_pings_is_waited_for(
    server: ReferenceServer, caplog: pytest.LogCaptureFixture
) -> None:
    hold = server.faults.add(Hold(match="/chunk", times=None))

    async def main() -> None:
        async with reading(source_of(server, stall_timeout=SHORT)) as reader:
            image = await image_of(reader)
            (session,) = server.open_sessions()

            async def let_go() -> None:
                await until(lambda: session.pings >= 9)  # three stall limits
                hold.release()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(let_go)
                assert await read_all(image) == CONTENT

    trio.run(main)
    assert len(server.sessions.all()) == 1
    assert retries(caplog) == []
    digests = [record.target for record in server.requests.all() if "/chunk" in record.target]
    assert len(digests) == len(set(digests))


def test_a_stop_of_the_process_is_not_a_silence_of_the_server(
    server: ReferenceServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + stopped)
    monkeypatch.setattr(conversation, "time", clock)
    hold = server.faults.add(Hold(match="/chunk"))

    async def main() -> None:
        nonlocal stopped
        async with reading(source_of(server)) as reader:
            source = reader.source
            index = FixedIndex(await source.fetch_file(serving.FIRST, IMAGE, 1 << 20))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(source.fetch_chunk, serving.FIRST, IMAGE, index.digest(0), 1 << 20)
                await until(lambda: hold.hits)
                stopped = 10_000.0  # longer than an answer may take; the session notices at the next request
                await source.fetch_chunk(serving.FIRST, IMAGE, index.digest(1), 1 << 20)
                hold.release()

    trio.run(main)
    assert len(server.sessions.all()) == 1
    assert retries(caplog) == []


def test_a_server_that_is_dead_is_noticed(server: ReferenceServer, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with reading(source_of(server, retry_timeout=0, stall_timeout=SHORT)) as reader:
            image = await image_of(reader)
            server.faults.add(Stall(match="/chunk"))
            started = trio.current_time()
            with pytest.raises(ConnectError, match="no answer for"):
                await read_all(image)
            assert SHORT <= trio.current_time() - started < serving.LIMIT / 2

    trio.run(main)


def test_an_answer_that_does_not_come_from_a_living_server_fails_by_itself(server: ReferenceServer) -> None:
    async def main() -> None:
        pacing = replace(serving.QUICK, least_try=SHORT / 2)
        source = source_of(server, retry_timeout=0, answer_timeout=SHORT, pacing=pacing)
        async with reading(source) as reader:
            image = await image_of(reader)
            hold = server.faults.add(Hold(match="/chunk"))
            with pytest.raises(ConnectError, match="no answer for 0 s, though the server is reachable") as e:
                await image.read(0, 1)
            assert not e.value.retryable
            assert await read_all(image) == CONTENT
            hold.release()

    trio.run(main)
    assert len(server.sessions.all()) == 1


def test_patience_asks_after_a_third_of_its_time_once_for_each_silence_and_gives_up_after_all_of_it() -> None:
    patience = Patience(30, 5, now=100)
    assert (patience.left(100), patience.to_ask(109.9)) == (10, False)
    assert patience.to_ask(110)
    assert (patience.to_ask(111), patience.left(111)) == (False, 19)
    assert (patience.over(130), patience.over(130.1)) == (False, True)

    patience.restart(129)
    assert (patience.over(159), patience.over(159.1)) == (False, True)
    assert (patience.to_ask(138.9), patience.to_ask(139)) == (False, True)
    assert patience.left(1000) == 0


def test_after_the_limit_of_a_request_patience_has_some_seconds_from_the_last_sign_of_life() -> None:
    patience = Patience(30, 6, now=100)
    patience.until = 120  # 20 s after the last sign of life: asked at a third of the stall limit as ever
    assert (patience.to_ask(109.9), patience.to_ask(110)) == (False, True)
    assert (patience.over(120), patience.over(120.1)) == (False, True)

    patience.restart(119)  # an answer that grows is not cut at the limit
    assert (patience.over(125), patience.over(125.1)) == (False, True)
    assert (patience.to_ask(120.9), patience.to_ask(121)) == (False, True)
    assert patience.left(121) == 4

    patience.restart(125)
    patience.until = math.inf  # only requests without a limit are left
    assert (patience.over(155), patience.over(155.1)) == (False, True)


def test_a_request_that_joins_a_silence_leaves_the_server_time_to_answer_a_ping() -> None:
    patience = Patience(30, 6, now=100)
    patience.until = 108 + 6  # it begins at 108, and its limit is over
    assert not patience.over(108)
    assert (patience.to_ask(109.9), patience.to_ask(110)) == (False, True)
    assert (patience.over(114), patience.over(114.1)) == (False, True)


LIMITED = Pacing(first_pause=0.002, longest_pause=0.02, least_try=SHORT)


def test_a_read_of_a_server_that_stalls_ends_with_the_limit(
    server: ReferenceServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        source = source_of(server, retry_timeout=SHORT, stall_timeout=10 * serving.LIMIT, pacing=LIMITED)
        async with reading(source) as reader:
            image = await image_of(reader)
            server.faults.add(Stall(match="/chunk", times=None))
            with pytest.raises(ConnectError, match="no answer for"), trio.fail_after(serving.LIMIT / 2):
                await read_all(image)

    trio.run(main)
    caplog.clear()


@pytest.mark.parametrize("what", ["groups", "file-name=qemu"])
def test_a_request_to_the_api_that_stalls_ends_with_the_limit(
    server: ReferenceServer, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    async def main() -> None:
        source = source_of(server, retry_timeout=SHORT, pacing=LIMITED)  # the API's own limit is 60 s
        async with reading(source) as reader:
            calls: dict[str, Callable[[], Awaitable[object]]] = {
                "groups": lambda: reader.source.groups(ROOT_NAMESPACE),
                "file-name=qemu": lambda: reader.source.fetch_file(serving.FIRST, serving.CONFIG, 1 << 20),
            }
            server.faults.add(Hold(match=what, times=None))
            with pytest.raises(ConnectError, match="no answer for"), trio.fail_after(serving.LIMIT / 2):
                await calls[what]()

    trio.run(main)
    caplog.clear()


def test_after_the_limit_an_answer_of_a_living_server_is_still_waited_for(server: ReferenceServer) -> None:
    hold = server.faults.add(Hold(match="/chunk", times=None))

    async def main() -> None:
        async with reading(source_of(server, retry_timeout=0, pacing=LIMITED)) as reader:
            image = await image_of(reader)
            (session,) = server.open_sessions()

            async def let_go() -> None:
                await until(lambda: session.pings >= 9)  # three times what a silent server has
                hold.release()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(let_go)
                assert await read_all(image) == CONTENT

    trio.run(main)
    assert len(server.sessions.all()) == 1


# --- memory


def test_a_lost_connection_leaves_nothing_of_its_answers(
    server: ReferenceServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Place(bytearray):
        """The place of an answer."""

        def __init__(self, size: int) -> None:
            super().__init__(size)
            places.append(weakref.ref(self))

    caplog.set_level(logging.INFO, "pbsfs.sources.retry")  # records keep errors
    places: list[weakref.ref[Place]] = []
    monkeypatch.setattr(protocol, "bytearray", Place, raising=False)

    async def main() -> None:
        async with reading(source_of(server)) as reader:
            image = await image_of(reader)
            stall = server.faults.add(Stall(match="/chunk", after_bytes=40_000))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_all, image)
                await until(lambda: stall.hits)
                await until(lambda: places)
                server.drop_connections()
            assert len(server.sessions.all()) > 1
            await until(lambda: all(place() is None for place in places))

    gc.collect()
    gc.disable()
    try:
        trio.run(main)
    finally:
        gc.enable()

"""Whatever goes wrong on the way: the right bytes or a clear error, within limits of time and memory."""

from __future__ import annotations

import errno
import resource
import shutil
import socket
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import trio
import trio.testing

from pbsfs.base.errors import (
    AuthError,
    ConnectError,
    DamageError,
    ForbiddenError,
    NotFoundError,
    PbsfsError,
    SourceError,
    WrongServerError,
    errno_of,
)
from pbsfs.base.names import ROOT_NAMESPACE
from pbsfs.base.secret import Secret
from pbsfs.formats.index import encode_fixed
from pbsfs.reader.image import Image
from pbsfs.sources.http.client import HttpClient
from pbsfs.sources.http.tls import Trust
from pbsfs.sources.pacing import DEFAULT_PACING, Pacing
from pbsfs.sources.retry import connecting
from pbsfs.sources.server.limits import ServerLimits
from pbsfs.sources.server.repository import Repository
from pbsfs.sources.server.source import ServerSettings, ServerSource
from pbsfs.testing.writer import DatastoreWriter
from tests.sources.server import serving
from tests.sources.server.serving import (
    CHUNK,
    CONFIG,
    CONTENT,
    FIRST,
    IMAGE,
    SECOND,
    TOKEN,
    USER,
    VM,
    image_of,
    opened,
    read_all,
    reading,
    source_of,
    until,
)
from tests.support.run import in_trio
from tests.support.server import (
    Body,
    Corrupt,
    Drop,
    EndlessHeaders,
    Garbage,
    GoAway,
    Hold,
    Huge,
    ReferenceServer,
    Reset,
    Stall,
    Status,
    Truncate,
    WrongLength,
    ZipBomb,
)
from tests.support.server.faults import Fault

OPEN = "/api2/json/reader?"
INDEX = "/download?file-name=drive"
CHUNKS = "/chunk"
PAUSING = Pacing(first_pause=0.01, longest_pause=1000)

SHORT = 0.3
"""Seconds for which a peer may be silent, or work is tried again, where a test waits for the end of it."""


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """That something is tried again is told of; anything else would fail the test."""
    yield
    records = caplog.get_records("call")
    records[:] = [r for r in records if not r.getMessage().endswith(("; trying again", ": available again"))]


def read_through(server: ReferenceServer, *faults: Fault, **settings: float) -> bytes:
    """The image, opened and read while the faults strike."""

    async def main() -> bytes:
        async with reading(source_of(server, **settings)) as reader:  # type: ignore[arg-type]
            info = await serving.info_of(reader)
            for fault in faults:
                server.faults.add(fault)
            return await read_all(await reader.open_image(info, info.files[0]))

    return trio.run(main)


# --- what is survived


@pytest.mark.parametrize("match", [OPEN, INDEX, CHUNKS])
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_connection_dropped_before_any_answer_costs_nothing(
    server: ReferenceServer, match: str, reset: bool
) -> None:
    drop = Drop(match=match, reset=reset)
    assert read_through(server, drop) == CONTENT
    assert drop.hits == 1


def positions() -> list[int]:
    """Bytes that the server has sent: densely in the handshake and the first answers, then by and by."""
    return [*range(0, 400, 23), *range(400, 4000, 151), *range(4000, 600_000, 29_989)]


@pytest.mark.parametrize("part", range(4))
def test_a_connection_dropped_at_any_byte_costs_nothing(server: ReferenceServer, part: int) -> None:
    struck = 0

    async def main() -> None:
        nonlocal struck
        for number, position in enumerate(positions()[part::4]):
            async with reading(source_of(server, TOKEN)) as reader:
                info = await serving.info_of(reader)
                await reader.source.fetch_file(FIRST, CONFIG, 1 << 20)
                # The API's connection is under way, with more bytes than that: the session's is struck.
                drop = server.faults.add(Drop(after_bytes=position, reset=number % 2 == 1))
                assert await read_all(await reader.open_image(info, info.files[0])) == CONTENT
                struck += drop.hits
                server.faults.clear()

    trio.run(main)
    assert struck >= len(positions()[part::4]) * 3 // 4


@pytest.mark.parametrize("after", [0, 1, 70, 4000, 70_000])
@pytest.mark.parametrize("match", [INDEX, CHUNKS])
def test_a_connection_dropped_within_an_answer_costs_nothing(
    server: ReferenceServer, match: str, after: int
) -> None:
    assert read_through(server, Drop(match=match, after_bytes=after), Drop(match=match, skip=1)) == CONTENT


@pytest.mark.parametrize("what", ["groups", "snapshots", "download", "namespace"])
@pytest.mark.parametrize("after", [0, 1, 60])
def test_a_list_whose_connection_is_dropped_is_asked_again(
    server: ReferenceServer, what: str, after: int
) -> None:
    async def main() -> None:
        async with opened(source_of(server)) as source:
            source._namespaces = (float("-inf"), [])
            calls: dict[str, Callable[[], Awaitable[object]]] = {
                "groups": lambda: source.groups(ROOT_NAMESPACE),
                "snapshots": lambda: source.snapshots(VM),
                "download": lambda: source.fetch_file(FIRST, CONFIG, 1 << 20),
                "namespace": lambda: source.namespaces(ROOT_NAMESPACE),
            }
            expected = await calls[what]()
            source._namespaces = (float("-inf"), [])
            drop = server.faults.add(Drop(match=f"/{what}", after_bytes=after, times=2))
            assert await calls[what]() == expected
            assert drop.hits == 2

    trio.run(main)


@pytest.mark.parametrize("auth_id", [USER, TOKEN], ids=["password", "token"])
def test_a_long_sequential_read_goes_on_when_the_server_restarts_in_the_middle(
    server: ReferenceServer, auth_id: str
) -> None:
    async def main() -> None:
        async with reading(source_of(server, auth_id)) as reader:
            handle = (await image_of(reader)).handle()
            found = b""
            for number, offset in enumerate(range(0, len(CONTENT), CHUNK // 2)):
                if number % 5 == 3:
                    server.restart()
                found += await handle.read(offset, CHUNK // 2)
            handle.close()
            assert found == CONTENT

    trio.run(main)
    assert len(server.sessions.all()) >= 3


def test_a_read_waits_for_a_server_that_is_away_and_goes_on_when_it_is_back(
    server: ReferenceServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:

    async def main() -> None:
        async with reading(source_of(server)) as reader:
            image = await image_of(reader)
            assert await image.read(0, CHUNK) == CONTENT[:CHUNK]
            server.go_down()

            async def bring_it_back() -> None:
                await until(lambda: any("trying again" in message for message in caplog.messages))
                server.come_back()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(bring_it_back)
                assert await read_all(image) == CONTENT

    trio.run(main)
    assert any(message.endswith("available again") for message in caplog.messages)


@pytest.mark.parametrize("last_stream_id", [None, 0, 1 << 20], ids=["before", "none", "all"])
@pytest.mark.parametrize("match", [INDEX, CHUNKS])
def test_a_server_that_says_goodbye_costs_nothing(
    server: ReferenceServer, match: str, last_stream_id: int | None
) -> None:
    goodbye = GoAway(match=match, last_stream_id=last_stream_id)
    assert read_through(server, goodbye, GoAway(match=match, skip=3, code=2)) == CONTENT
    assert goodbye.hits == 1


@pytest.mark.parametrize("after", [0, 1, 1000])
@pytest.mark.parametrize("match", [INDEX, CHUNKS])
def test_a_stream_that_is_reset_is_asked_again_on_the_same_session(
    server: ReferenceServer, match: str, after: int
) -> None:
    reset = Reset(match=match, after_bytes=after, times=2)
    assert read_through(server, reset) == CONTENT
    assert reset.hits == 2
    assert len(server.sessions.all()) == 1


@pytest.mark.parametrize("after", [0, 10, 1000])
@pytest.mark.parametrize("match", [OPEN, INDEX, CHUNKS])
def test_a_session_that_stalls_is_given_up_and_the_read_goes_on(
    server: ReferenceServer, match: str, after: int
) -> None:
    stall = Stall(match=match, after_bytes=after)
    assert read_through(server, stall, stall_timeout=SHORT) == CONTENT
    assert stall.hits == 1


def test_an_answer_that_never_comes_is_given_up_although_the_server_lives(server: ReferenceServer) -> None:
    assert read_through(server, Hold(match=CHUNKS), answer_timeout=SHORT) == CONTENT
    assert len(server.sessions.all()) == 1


def test_a_list_that_stalls_is_asked_again(server: ReferenceServer) -> None:
    async def main() -> None:
        async with opened(source_of(server, limits=ServerLimits(request_timeout=SHORT))) as source:
            for after in (0, 30, 400):
                stall = server.faults.add(Stall(match="/snapshots", after_bytes=after))
                assert len(await source.snapshots(VM)) == 2
                assert stall.hits == 1

    trio.run(main)


@pytest.mark.parametrize("status", [500, 502, 503, 429])
@pytest.mark.parametrize("match", [OPEN, INDEX, CHUNKS])
def test_a_server_that_can_not_now_is_asked_again(server: ReferenceServer, match: str, status: int) -> None:
    fault = Status(match=match, status=status, times=3)
    assert read_through(server, fault) == CONTENT
    assert fault.hits == 3


def test_a_list_that_the_server_can_not_give_now_is_asked_again(server: ReferenceServer) -> None:
    async def main() -> None:
        async with opened(source_of(server)) as source:
            server.faults.add(Status(match="/groups", status=503, times=3))
            assert len(await source.groups(ROOT_NAMESPACE)) == 1

    trio.run(main)


# --- who we are


def test_a_ticket_that_expires_in_the_middle_is_renewed_unnoticed(server: ReferenceServer) -> None:
    async def main() -> None:
        async with reading(source_of(server)) as reader:
            image = await image_of(reader)
            assert await image.read(0, CHUNK) == CONTENT[:CHUNK]
            server.clock.advance(3 * 3600)
            assert len(await reader.source.snapshots(VM)) == 2
            server.clock.advance(3 * 3600)
            server.drop_connections()
            assert await read_all(image) == CONTENT

    trio.run(main)
    assert server.requests.count("/access/ticket") == 3


def test_many_reads_that_meet_an_expired_ticket_at_once_log_in_once(server: ReferenceServer) -> None:
    async def main() -> None:
        async with opened(source_of(server)) as source:
            server.clock.advance(3 * 3600)
            async with trio.open_nursery() as nursery:
                for _reader in range(10):
                    nursery.start_soon(source.snapshots, VM)
                    nursery.start_soon(source.fetch_file, FIRST, IMAGE, 1 << 20)
                    nursery.start_soon(source.fetch_file, SECOND, IMAGE, 1 << 20)

    trio.run(main)
    assert server.requests.count("/access/ticket") == 2


@pytest.mark.parametrize("auth_id", [USER, TOKEN], ids=["password", "token"])
def test_who_is_removed_in_the_middle_is_told_so_and_not_tried_again(
    server: ReferenceServer, auth_id: str
) -> None:
    async def main() -> None:
        async with reading(source_of(server, auth_id)) as reader:
            image = await image_of(reader)
            assert await image.read(0, CHUNK) == CONTENT[:CHUNK]
            server.remove(auth_id)
            with pytest.raises(AuthError, match="does not accept"):
                await reader.source.snapshots(VM)
            server.drop_connections()
            server.requests.clear()
            with pytest.raises(AuthError, match="does not accept") as caught:
                await image.read(4 * CHUNK + CHUNK, CHUNK)
            assert errno_of(caught.value) == errno.EACCES
            # One for the session, or the login's own two questions, and never more.
            assert server.requests.count() <= 3

    trio.run(main)


def test_who_gets_the_right_back_reads_on_without_reopening(server: ReferenceServer) -> None:
    async def main() -> None:
        async with reading(source_of(server, TOKEN)) as reader:
            image = await image_of(reader)
            server.accounts.grant(TOKEN, "/datastore/golden", ())
            server.drop_connections()
            with pytest.raises(ForbiddenError):
                await image.read(0, CHUNK)
            server.accounts.grant(TOKEN, "/datastore/golden", ("Datastore.Read", "Datastore.Audit"))
            assert await read_all(image) == CONTENT

    trio.run(main)


# --- the snapshot under us


@pytest.fixture
def own(tmp_path: Path) -> Iterator[ReferenceServer]:
    """A server over a datastore that may be written to."""
    with serving.served(serving.fill(tmp_path / "datastore")) as server:
        yield server


def stored(tmp_path: Path) -> Path:
    return DatastoreWriter(tmp_path / "datastore").snapshot_path(FIRST)


def test_a_snapshot_deleted_under_us_is_an_error_at_once_and_the_others_stay_readable(
    own: ReferenceServer, tmp_path: Path
) -> None:
    async def main() -> None:
        async with reading(source_of(own)) as reader:
            image, other = await image_of(reader), await image_of(reader, SECOND)
            assert await image.read(0, CHUNK) == CONTENT[:CHUNK]
            shutil.rmtree(stored(tmp_path))
            own.drop_connections()
            with pytest.raises(NotFoundError, match="does not exist"):
                await image.read(CHUNK, CHUNK)
            assert await image.read(0, CHUNK) == CONTENT[:CHUNK]  # it was read before
            assert await read_all(other) == serving.NEWER_CONTENT

    trio.run(main)


def test_a_locked_snapshot_is_read_once_the_lock_is_gone(
    server: ReferenceServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with reading(source_of(server)) as reader:
            info = await serving.info_of(reader)

            async def read() -> None:
                image = await reader.open_image(info, info.files[0])
                assert await read_all(image) == CONTENT

            async with trio.open_nursery() as nursery:
                with server.locked(FIRST):
                    nursery.start_soon(read)
                    await until(lambda: any("is locked" in message for message in caplog.messages))

    trio.run(main)


def test_a_snapshot_that_stays_locked_is_an_error_that_says_so(server: ReferenceServer) -> None:
    with (
        server.locked(FIRST),
        pytest.raises(
            SourceError, match="is locked on the server, by a backup, a removal or the like: unable to"
        ),
    ):
        read_through(server, retry_timeout=0.05)


def test_an_index_that_changed_while_we_were_away_is_an_error_and_not_damage(
    own: ReferenceServer, tmp_path: Path
) -> None:
    file = stored(tmp_path) / IMAGE.filename
    original = file.read_bytes()

    async def main() -> None:
        async with reading(source_of(own)) as reader:
            image = await image_of(reader)
            assert await image.read(0, CHUNK) == CONTENT[:CHUNK]
            swapped = [image.index.digest(number) for number in reversed(range(image.index.count))]
            other, _csum = encode_fixed(swapped, size=image.size, chunk_size=CHUNK, ctime=0)
            file.write_bytes(other)
            own.drop_connections()
            for _turn in range(2):
                with pytest.raises(SourceError, match=r"not the one that was opened; .* open the file again"):
                    await image.read(5 * CHUNK, CHUNK)
            for content in (original[:-32], original + bytes(32)):
                file.write_bytes(content)
                own.drop_connections()
                with pytest.raises((SourceError, NotFoundError)):
                    await image.read(5 * CHUNK, CHUNK)
            file.write_bytes(original)
            assert await read_all(image) == CONTENT

    trio.run(main)


# --- garbage


@pytest.mark.parametrize("at", [0, 5, 8, 12, 100, -1])
def test_a_corrupted_chunk_is_damage_and_never_wrong_bytes(server: ReferenceServer, at: int) -> None:
    with pytest.raises(DamageError, match=r"chunk [0-9a-f]{64}"):
        read_through(server, Corrupt(match=CHUNKS, at=at, times=None))


@pytest.mark.parametrize("match", [INDEX, CHUNKS, "/download?backup"])
def test_what_a_bit_that_flipped_on_the_way_has_broken_is_fetched_again(
    server: ReferenceServer, match: str
) -> None:
    flip = Corrupt(match=match)
    assert read_through(server, flip) == CONTENT
    assert flip.hits == 1


def test_another_chunk_than_was_asked_for_is_damage(server: ReferenceServer, datastore: Path) -> None:
    writer = DatastoreWriter(datastore)
    other = next(p for p in sorted(writer.path.rglob(".chunks/*/*")) if p.stat().st_size > 60_000)
    with pytest.raises(DamageError):
        read_through(server, Body(match=CHUNKS, make=lambda _body: other.read_bytes(), times=30))


@pytest.mark.parametrize("at", [0, 40, 70, 4096, -1])
def test_a_corrupted_index_is_damage(server: ReferenceServer, at: int) -> None:
    with pytest.raises(DamageError):
        read_through(server, Corrupt(match=INDEX, at=at, times=None))


@pytest.mark.parametrize("missing", [1, 33, 10**9])
@pytest.mark.parametrize("match", [INDEX, CHUNKS])
def test_a_truncated_body_is_an_error_or_asked_again_and_never_wrong_bytes(
    server: ReferenceServer, match: str, missing: int
) -> None:
    async def main() -> None:
        async with reading(source_of(server, retry_timeout=1)) as reader:
            info = await serving.info_of(reader)
            server.faults.add(Truncate(match=match, missing=missing))
            try:
                found = await read_all(await reader.open_image(info, info.files[0]))
            except DamageError:
                found = await read_all(await reader.open_image(info, info.files[0]))
            assert found == CONTENT

    trio.run(main)


@pytest.mark.parametrize("by", [1, -1, 10**12])
@pytest.mark.parametrize("match", [INDEX, CHUNKS])
def test_a_wrong_content_length_is_an_error_or_asked_again_and_never_wrong_bytes(
    server: ReferenceServer, match: str, by: int
) -> None:
    async def main() -> None:
        async with reading(source_of(server)) as reader:
            info = await serving.info_of(reader)
            server.faults.add(WrongLength(match=match, by=by))
            try:
                found = await read_all(await reader.open_image(info, info.files[0]))
            except DamageError:
                found = await read_all(await reader.open_image(info, info.files[0]))
            assert found == CONTENT

    trio.run(main)


@pytest.mark.parametrize("fault", [Truncate, WrongLength, Corrupt])
def test_a_list_that_is_no_json_or_cut_is_an_error_or_asked_again(
    server: ReferenceServer, fault: type[Fault]
) -> None:
    async def main() -> None:
        async with opened(source_of(server)) as source:
            expected = await source.groups(ROOT_NAMESPACE)
            strikes = server.faults.add(fault(match="/groups"))
            try:
                found = await source.groups(ROOT_NAMESPACE)
            except PbsfsError:
                found = await source.groups(ROOT_NAMESPACE)
            assert found == expected
            assert strikes.hits == 1

    trio.run(main)


@pytest.mark.parametrize("match", [OPEN, INDEX, CHUNKS])
def test_a_header_without_an_end_costs_an_error_within_the_limit(server: ReferenceServer, match: str) -> None:
    with pytest.raises(SourceError) as caught:
        read_through(server, EndlessHeaders(match=match, times=None), retry_timeout=0.1)
    assert isinstance(caught.value, WrongServerError if match == OPEN else ConnectError)


def test_a_list_with_a_header_without_an_end_costs_an_error(server: ReferenceServer) -> None:
    async def main() -> None:
        async with opened(source_of(server, retry_timeout=0.1)) as source:
            server.faults.add(EndlessHeaders(match="/groups", times=None))
            with pytest.raises(SourceError):
                await source.groups(ROOT_NAMESPACE)

    trio.run(main)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n",
        b"\xff" * 100,
        b"\0" * 100_000,
        b"\0\0\0\4\0\0\0\0\0" + b"\0\0\x7f\0\0\0\0\0\1" + bytes(127),
    ],
    ids=["http1", "ones", "zeros", "data before all"],
)
def test_garbage_behind_the_upgrade_costs_an_error_within_the_limit(
    server: ReferenceServer, data: bytes
) -> None:
    with pytest.raises(ConnectError):
        read_through(server, Garbage(data=data, times=None), retry_timeout=0.1)


def test_garbage_behind_one_upgrade_costs_nothing(server: ReferenceServer) -> None:
    assert read_through(server, Garbage()) == CONTENT


@pytest.mark.parametrize("announce", [True, False], ids=["announced", "silent"])
def test_a_zip_bomb_costs_an_error_and_little_memory(server: ReferenceServer, announce: bool) -> None:
    with bounded_memory(32 << 20), pytest.raises(DamageError):
        read_through(server, ZipBomb(match=CHUNKS, announce=announce, times=None))


@pytest.mark.parametrize("announce", [True, False], ids=["announced", "silent"])
@pytest.mark.parametrize("match", [INDEX, CHUNKS, "/download?backup"])
def test_an_answer_of_ten_gigabytes_costs_an_error_and_little_memory(
    server: ReferenceServer, match: str, announce: bool
) -> None:
    started = time.monotonic()
    with bounded_memory(64 << 20), pytest.raises(DamageError):
        read_through(server, Huge(match=match, announce=announce, times=None))
    assert time.monotonic() - started < serving.LIMIT


def test_a_huge_error_text_costs_little_memory(server: ReferenceServer) -> None:
    words = "x" * (8 << 20)
    for match in (OPEN, INDEX, CHUNKS, "/download?backup"):
        with pytest.raises(PbsfsError) as caught:
            read_through(server, Status(match=match, status=418, text=words, times=None))
        assert len(str(caught.value)) < 3000
        server.faults.clear()


class bounded_memory:  # noqa: N801 - reads as a function
    """Checks the peak of what Python allocates."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __enter__(self) -> None:
        self._rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        tracemalloc.start()

    def __exit__(self, *_exc: object) -> None:
        _now, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - self._rss
        assert peak < self.limit, f"{peak >> 20} MiB"
        assert grown < 4 * self.limit, f"{grown >> 20} MiB more resident"


# --- limits, and the end of it


def test_a_read_fails_when_the_limit_is_over_and_the_image_recovers_by_itself(
    server: ReferenceServer,
) -> None:
    async def main() -> None:
        async with reading(source_of(server, retry_timeout=SHORT)) as reader:
            image = await image_of(reader)
            assert await image.read(0, CHUNK) == CONTENT[:CHUNK]
            server.go_down()
            for _turn in range(2):
                started = time.monotonic()
                with pytest.raises(ConnectError) as caught:
                    await image.read(CHUNK, CHUNK)
                assert errno_of(caught.value) == errno.EIO
                assert SHORT * 0.9 <= time.monotonic() - started < SHORT + 5
            assert await image.read(0, CHUNK) == CONTENT[:CHUNK]
            server.come_back()
            assert await read_all(image) == CONTENT
            assert len(await reader.source.snapshots(VM)) == 2

    trio.run(main)


@pytest.mark.parametrize("readers", [1, 10])
@pytest.mark.parametrize("what", ["index", "list", "blob"])
def test_a_server_that_takes_no_connection_is_given_up_at_the_limit_however_many_read(
    what: str, readers: int
) -> None:
    async def main(port: int) -> None:
        source = ServerSource(
            Repository("reader@pbs", "viewer", "127.0.0.1", port, "store"),
            Secret("secret"),
            Trust(pinned="ab" * 32),
            ServerSettings(retry_timeout=SHORT, connections=1),
            limits=ServerLimits(pacing=Pacing(least_try=SHORT)),
        )
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "index": lambda: source.fetch_file(FIRST, IMAGE, 1 << 20),
            "list": lambda: source.groups(ROOT_NAMESPACE),
            "blob": lambda: source.fetch_file(FIRST, CONFIG, 1 << 20),
        }

        async def read() -> None:
            with pytest.raises(ConnectError, match="no connection within"):
                await calls[what]()

        async with trio.open_nursery() as nursery:
            for _reader in range(readers):
                nursery.start_soon(read)

    with socket.create_server(("127.0.0.1", 0)) as silent:  # the TLS handshake would take 15 s
        started = time.monotonic()
        trio.run(main, silent.getsockname()[1])
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("token", ["viewer", None])
@pytest.mark.parametrize("what", ["namespaces", "groups"])
@in_trio
async def test_listings_side_by_side_all_end_at_the_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str, token: str | None
) -> None:
    async def unreachable(*_arguments: object, **_options: object) -> NoReturn:
        with connecting("the server"):
            await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(HttpClient, "request", unreachable)
    repository = Repository("reader@pbs", token, "127.0.0.1", 8007, "store")
    source = ServerSource(repository, Secret("secret"), Trust(), ServerSettings(retry_timeout=20))
    calls = {"namespaces": source.namespaces, "groups": source.groups}
    ends: list[float] = []

    async def ask() -> None:
        with pytest.raises(ConnectError, match="no connection within"):
            await calls[what](ROOT_NAMESPACE)
        ends.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        for _task in range(8):
            nursery.start_soon(ask)
    assert len(ends) == 8
    assert max(ends) <= 20 + 2 * DEFAULT_PACING.least_try, (
        "a try that is under way at the limit, and one more"
    )
    caplog.clear()


@pytest.mark.parametrize("what", ["chunk", "index", "list", "blob"])
def test_giving_up_during_a_retry_takes_effect_at_once(
    server: ReferenceServer, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    async def main() -> None:
        async with reading(source_of(server, retry_timeout=1000, pacing=PAUSING)) as reader:
            image = await image_of(reader)
            calls: dict[str, Callable[[], Awaitable[object]]] = {
                "chunk": lambda: image.read(0, CHUNK),
                "index": lambda: reader.source.fetch_file(SECOND, IMAGE, 1 << 20),
                "list": lambda: reader.source.snapshots(VM),
                "blob": lambda: reader.source.fetch_file(FIRST, CONFIG, 1 << 20),
            }
            server.go_down()
            started = time.monotonic()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(calls[what])
                await until(lambda: any("trying again" in message for message in caplog.messages))
                nursery.cancel_scope.cancel()
            assert time.monotonic() - started < 5

    trio.run(main)


def test_closing_during_a_retry_takes_effect_at_once(
    server: ReferenceServer, caplog: pytest.LogCaptureFixture
) -> None:
    ended = 0.0

    async def wait(image: Image) -> None:
        with pytest.raises(SourceError):
            await image.read(0, CHUNK)

    async def main() -> None:
        nonlocal ended
        async with (
            trio.open_nursery() as nursery,
            reading(source_of(server, retry_timeout=1000, pacing=PAUSING)) as reader,
        ):
            image = await image_of(reader)
            server.go_down()
            nursery.start_soon(wait, image)
            await until(lambda: any("trying again" in message for message in caplog.messages))
            ended = time.monotonic()
        assert time.monotonic() - ended < 5

    trio.run(main)


def test_starting_without_a_server_fails_at_once_and_says_so(server: ReferenceServer) -> None:
    server.go_down()

    async def main() -> None:
        async with opened(source_of(server)):
            pass

    with pytest.raises(ConnectError, match="cannot connect to"):
        trio.run(main)

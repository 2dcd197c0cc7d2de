"""What a reader makes of a server's error answers: damage only where they say so, else it is asked again."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
import trio

from pbsfs.base.errors import (
    AuthError,
    DamageError,
    NotFoundError,
    SourceError,
    UnavailableError,
    UnknownDatastoreError,
    errno_of,
)
from pbsfs.base.names import ROOT_NAMESPACE
from pbsfs.reader.damage import ZeroedRanges
from pbsfs.reader.reader import open_reader
from pbsfs.sources.server.source import ServerSource
from tests.sources.server import serving
from tests.sources.server.serving import (
    CONFIG,
    CONTENT,
    FIRST,
    IMAGE,
    PASSWORD,
    TOKEN,
    USER,
    VM,
    image_of,
    opened,
    read_all,
    reading,
    source_of,
)
from tests.support.server import ReferenceServer, Status, texts

SHORT = 0.05
"""Seconds for which work is tried again where a test waits for the end of it."""

CHUNKS = "/chunk"
INDEX = "/download?file-name=drive"
BLOB = "file-name=qemu"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Short pauses; that something is tried again is logged, anything else would fail the test."""
    monkeypatch.setattr(ServerSource, "doubts", (0.0, 0.0))
    yield
    records = caplog.get_records("call")
    records[:] = [r for r in records if not r.getMessage().endswith(("; trying again", ": available again"))]


async def read_with_zeros(source: ServerSource, zeroed: ZeroedRanges | None) -> bytes:
    async with open_reader(source, zeroed=zeroed) as reader:
        return await read_all(await image_of(reader))


def always(match: str, text: str, status: int = 400) -> Status:
    return Status(match=match, status=status, text=text, times=None)


# --- chunks


@pytest.mark.parametrize("text", texts.PASSING_CHUNKS)
def test_a_chunk_that_can_not_be_had_now_is_asked_for_until_it_can(
    server: ReferenceServer, text: str
) -> None:
    fault = server.faults.add(Status(match=CHUNKS, status=400, text=text, times=4))
    zeroed = ZeroedRanges()
    assert trio.run(read_with_zeros, source_of(server), zeroed) == CONTENT
    assert fault.hits == 4
    assert zeroed.count == 0


@pytest.mark.parametrize(
    ("status", "text"),
    [*((400, text) for text in texts.PASSING_CHUNKS), (404, "not found"), (503, "")],
)
def test_a_chunk_that_can_not_be_had_for_long_is_an_error_and_never_zeros(
    server: ReferenceServer, status: int, text: str
) -> None:
    server.faults.add(always(CHUNKS, text, status))
    zeroed = ZeroedRanges()
    with pytest.raises(SourceError) as caught:
        trio.run(read_with_zeros, source_of(server, retry_timeout=SHORT), zeroed)
    assert errno_of(caught.value) == errno.EIO
    assert caught.value.retryable
    assert zeroed.count == 0


@pytest.mark.parametrize("text", texts.BROKEN_CHUNKS)
def test_a_chunk_that_the_server_calls_broken_is_damage_when_it_says_so_three_times(
    server: ReferenceServer, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    twice = server.faults.add(Status(match=CHUNKS, status=400, text=text, times=2))
    assert trio.run(read_with_zeros, source_of(server), None) == CONTENT
    assert twice.hits == 2
    server.faults.add(always(CHUNKS, text))
    with pytest.raises(DamageError, match=r"chunk [0-9a-f]{64}: the server can't read it: "):
        trio.run(read_with_zeros, source_of(server), None)
    zeroed = ZeroedRanges()
    assert trio.run(read_with_zeros, source_of(server), zeroed) == bytes(len(CONTENT))
    assert zeroed.count
    caplog.clear()


# --- indexes and configurations


@pytest.mark.parametrize("text", texts.PASSING_FILES)
@pytest.mark.parametrize("match", [INDEX, BLOB])
def test_a_file_that_can_not_be_had_now_is_asked_for_until_it_can(
    server: ReferenceServer, match: str, text: str
) -> None:
    async def main() -> None:
        async with opened(source_of(server)) as source:
            archive = IMAGE if match == INDEX else CONFIG
            expected = await source.fetch_file(FIRST, archive, 1 << 20)
            fault = server.faults.add(Status(match=match, status=400, text=text, times=3))
            assert await source.fetch_file(FIRST, archive, 1 << 20) == expected
            assert fault.hits == 3

    trio.run(main)


@pytest.mark.parametrize("text", texts.PASSING_FILES)
@pytest.mark.parametrize("match", [INDEX, BLOB])
def test_a_file_that_can_not_be_had_for_long_is_neither_missing_nor_damaged(
    server: ReferenceServer, match: str, text: str
) -> None:
    server.faults.add(always(match, text))

    async def main() -> None:
        async with reading(source_of(server, retry_timeout=SHORT)) as reader:
            info = await serving.info_of(reader)
            file = next(f for f in info.files if f.archive == (IMAGE if match == INDEX else CONFIG))
            await (reader.open_image(info, file) if match == INDEX else reader.read_blob(info, file))

    with pytest.raises(SourceError) as caught:
        trio.run(main)
    assert "missing" not in str(caught.value)
    assert caught.value.retryable


@pytest.mark.parametrize("text", texts.MISSING_FILES)
def test_a_file_that_the_server_does_not_have_is_missing(server: ReferenceServer, text: str) -> None:
    async def main() -> None:
        async with opened(source_of(server)) as source:
            for match, archive in ((INDEX, IMAGE), (BLOB, CONFIG)):
                server.faults.add(always(match, text))
                with pytest.raises(NotFoundError):
                    await source.fetch_file(FIRST, archive, 1 << 20)

    trio.run(main)


@pytest.mark.parametrize("text", texts.BROKEN_FILES)
def test_an_index_that_the_server_can_not_parse_is_damage(server: ReferenceServer, text: str) -> None:
    server.faults.add(always(INDEX, text))
    zeroed = ZeroedRanges()
    with pytest.raises(DamageError, match="the server can't read it"):
        trio.run(read_with_zeros, source_of(server), zeroed)
    assert zeroed.count == 0


# --- locks, maintenance, datastores


@pytest.mark.parametrize("text", texts.LOCKED)
def test_a_locked_snapshot_is_waited_for_and_the_error_is_fit_for_people(
    server: ReferenceServer, text: str
) -> None:
    fault = server.faults.add(Status(match="/api2/json/reader?", status=400, text=text, times=3))
    assert trio.run(read_with_zeros, source_of(server), None) == CONTENT
    assert fault.hits == 3
    server.faults.add(always("/api2/json/reader?", text))
    with pytest.raises(UnavailableError, match="is locked on the server, by a backup") as caught:
        trio.run(read_with_zeros, source_of(server, retry_timeout=SHORT), None)
    assert "BackupDir {" not in str(caught.value)


@pytest.mark.parametrize("text", texts.MAINTENANCE)
@pytest.mark.parametrize("match", ["/namespace", "/groups", "/snapshots", BLOB, "/api2/json/reader?"])
def test_maintenance_is_waited_for_from_the_start_on(
    server: ReferenceServer, match: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    fault = server.faults.add(Status(match=match, status=400, text=text, times=3))

    async def main() -> None:
        async with reading(source_of(server)) as reader:
            assert len(await reader.source.groups(ROOT_NAMESPACE)) == 1
            await reader.source.fetch_file(FIRST, CONFIG, 1 << 20)
            assert await read_all(await image_of(reader)) == CONTENT

    trio.run(main)
    assert fault.hits == 3
    assert sum("trying again" in message for message in caplog.messages) == 1


def test_a_datastore_that_is_being_deleted_is_not_waited_for(server: ReferenceServer) -> None:
    fault = server.faults.add(always("/namespace", texts.DELETING))

    async def main() -> None:
        async with opened(source_of(server)):
            pass

    with pytest.raises(SourceError, match="datastore is being deleted") as caught:
        trio.run(main)
    assert not caught.value.retryable
    assert fault.hits == 1


@pytest.mark.parametrize("auth_id", ["root@pam", USER, TOKEN])
def test_a_datastore_that_does_not_exist_is_told_with_those_that_do(
    server: ReferenceServer, auth_id: str
) -> None:
    server.add_user("root@pam", PASSWORD)
    source = source_of(server, auth_id)
    source.repository = source.api.repository = type(source.repository).parse(
        server.repository(auth_id, store="nope")
    )

    async def main() -> None:
        async with opened(source):
            pass

    with pytest.raises(UnknownDatastoreError, match=r"no datastore 'nope' .* there is: golden"):
        trio.run(main)


# --- who we are


def test_a_ticket_that_is_refused_with_status_400_is_renewed(server: ReferenceServer) -> None:
    async def main() -> None:
        async with reading(source_of(server)) as reader:
            for match in ("/snapshots", "/api2/json/reader?"):
                server.faults.add(Status(match=match, status=400, text="authentication failed"))
            assert await read_all(await image_of(reader)) == CONTENT

    trio.run(main)
    assert server.requests.count("/access/ticket") == 3


@pytest.mark.parametrize("auth_id", [USER, TOKEN])
def test_a_login_that_is_refused_with_status_400_is_an_error_of_the_login(
    server: ReferenceServer, auth_id: str
) -> None:
    match = "/access/ticket" if auth_id == USER else "/namespace"
    server.faults.add(always(match, "authentication failed"))

    async def main() -> None:
        async with opened(source_of(server, auth_id)):
            pass

    with pytest.raises(AuthError):
        trio.run(main)


def test_a_list_of_a_group_that_fails_for_want_of_descriptors_is_asked_for_again(
    server: ReferenceServer,
) -> None:
    text = 'unable to read "/datastore/vm/100/owner" - Too many open files (os error 24)'
    fault = server.faults.add(Status(match="/snapshots", status=400, text=text, times=2))

    async def main() -> None:
        async with opened(source_of(server)) as source:
            assert len(await source.snapshots(VM)) == 2

    trio.run(main)
    assert fault.hits == 2

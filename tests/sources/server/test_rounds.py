"""How many times a start waits for the server: what is asked side by side, what alone, and what goes wrong.

Nothing here looks at a clock. The server holds its answers until all requests of a round have arrived.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from pbsfs.base.errors import AuthError, KeyRequiredError, NotFoundError, UnavailableError
from pbsfs.base.names import ROOT_NAMESPACE
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import CryptMode
from pbsfs.reader.reader import Reader
from pbsfs.sources.base import Expected
from pbsfs.sources.server.limits import DEFAULT, ServerLimits
from pbsfs.sources.server.source import ServerSource
from pbsfs.testing.writer import DatastoreWriter
from pbsfs.tree import BlobFile, ImageFile, Tree
from pbsfs.tree.expected import expected_at
from tests.sources.server import serving
from tests.sources.server.serving import (
    CONFIG_CONTENT,
    CONTENT,
    FIRST,
    LIMIT,
    TOKEN,
    USER,
    VM,
    read_all,
    reading,
    source_of,
    until,
)
from tests.support.server import Corrupt, Hold, ReferenceServer, Status

LOGIN = "/access/ticket"
NAMESPACES = "/namespace"
GROUPS = "/groups"
SNAPSHOTS = "/snapshots"
SESSION = "/api2/json/reader?"
MANIFEST = "file-name=index.json.blob"
INDEX = "/download?file-name=drive-scsi0.img.fidx"
CONFIG = "file-name=qemu-server.conf.blob"
CHUNK = "/chunk?"

PATH = f"{FIRST}/drive-scsi0.img"
BESIDE_INDEX = [GROUPS, SNAPSHOTS, MANIFEST, INDEX]


def expecting(
    server: ReferenceServer, path: str = PATH, auth_id: str = TOKEN, *, reads: bool = True, **options: object
) -> ServerSource:
    source = source_of(server, auth_id, **options)  # type: ignore[arg-type]
    source.expect(expected_at(path, ROOT_NAMESPACE, reads=reads))
    return source


async def first_byte(reader: Reader, path: str = PATH) -> bytes:
    node = await Tree(reader).find(path)
    assert isinstance(node, ImageFile)
    return bytes(await (await node.open()).read(0, 1))


def run_in_rounds(
    server: ReferenceServer,
    source: ServerSource,
    rounds: Sequence[Sequence[str]],
    work: Callable[[Reader], Awaitable[object]],
    *,
    connections: int,
) -> None:
    """Runs `work`, and lets each round's requests be answered only when all of them have arrived.

    It hangs, and fails, if one of them waits for the answer to another. `connections`: how many are made
    before the first answer.
    """
    holds = [[server.faults.add(Hold(match=match)) for match in matches] for matches in rounds]

    async def do(done: trio.Event) -> None:
        async with reading(source) as reader:
            await work(reader)
        done.set()

    async def main() -> None:
        done = trio.Event()
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(do, done)
                for number, waiting in enumerate(holds):
                    await until(lambda waiting=waiting: all(hold.hits for hold in waiting))  # type: ignore[misc]
                    if number == 0:
                        await until(lambda: server.connections == connections)
                    assert not any(hold.hits for later in holds[number + 1 :] for hold in later)
                    for hold in waiting:
                        hold.release()
                await done.wait()
            await until(lambda: not server.open_sessions())

    trio.run(main)
    assert server.requests.count() == sum(map(len, rounds))  # and nothing else was asked for


def test_the_first_byte_of_an_image_takes_three_round_trips_with_a_token(server: ReferenceServer) -> None:
    rounds = [[NAMESPACES, SESSION], BESIDE_INDEX, [CHUNK]]
    run_in_rounds(server, expecting(server), rounds, first_byte, connections=3)


def test_a_login_takes_one_more_during_which_everything_connects(server: ReferenceServer) -> None:
    rounds = [[LOGIN], [NAMESPACES, SESSION], BESIDE_INDEX, [CHUNK]]
    run_in_rounds(server, expecting(server, auth_id=USER), rounds, first_byte, connections=3)


def test_a_snapshot_is_listed_after_two_round_trips_without_a_session(server: ReferenceServer) -> None:
    async def names(reader: Reader) -> None:
        await Tree(reader).find(f"{FIRST}/drive-scsi0.img")

    source = expecting(server, reads=False)
    run_in_rounds(server, source, [[NAMESPACES], [GROUPS, SNAPSHOTS]], names, connections=2)


def test_a_blob_is_read_after_two_round_trips_without_a_session(server: ReferenceServer) -> None:
    async def read(reader: Reader) -> None:
        node = await Tree(reader).find(f"{FIRST}/qemu-server.conf")
        assert isinstance(node, BlobFile)
        assert await node.read() == CONFIG_CONTENT

    source = expecting(server, f"{FIRST}/qemu-server.conf")
    rounds = [[NAMESPACES], [GROUPS, SNAPSHOTS, MANIFEST, CONFIG]]
    run_in_rounds(server, source, rounds, read, connections=4)


@pytest.mark.parametrize(("auth_id", "most"), [(TOKEN, 2), (USER, 1)])
def test_a_wrong_secret_is_sent_twice_at_most_since_servers_lock_out_who_sends_it_often(
    server: ReferenceServer, auth_id: str, most: int
) -> None:
    async def main() -> None:
        async with reading(expecting(server, auth_id=auth_id, secret="wrong")):
            pass

    with pytest.raises(AuthError):
        trio.run(main)
    refused = [record for record in server.requests.all() if record.status == 401]
    assert 1 <= len(refused) <= most


def test_a_path_that_does_not_exist_is_the_same_error_as_ever(server: ReferenceServer) -> None:
    path = f"{VM.snapshot(FIRST.time + 1)}/drive-scsi0.img"

    def failure(source: ServerSource) -> str:
        async def main() -> None:
            async with reading(source) as reader:
                await Tree(reader).find(path)

        with pytest.raises(NotFoundError) as caught:
            trio.run(main)
        return str(caught.value)

    assert failure(expecting(server, path)) == failure(source_of(server, TOKEN))


def test_a_snapshot_that_is_locked_can_still_be_listed_and_reading_it_says_so(
    server: ReferenceServer,
) -> None:
    async def main() -> None:
        async with reading(expecting(server, retry_timeout=0.0)) as reader:
            node = await Tree(reader).find(PATH)
            assert isinstance(node, ImageFile)
            with pytest.raises(UnavailableError, match="locked"):
                await node.open()

    with server.locked(FIRST):
        trio.run(main)


async def whole(reader: Reader) -> None:
    node = await Tree(reader).find(PATH)
    assert isinstance(node, ImageFile)
    assert await read_all(await node.open()) == CONTENT


def read_whole(source: ServerSource) -> None:
    async def main() -> None:
        async with reading(source) as reader:
            await whole(reader)

    trio.run(main)


@pytest.mark.parametrize("match", [SESSION, GROUPS, SNAPSHOTS, MANIFEST, INDEX])
def test_a_passing_fault_of_what_was_asked_ahead_is_tried_again(server: ReferenceServer, match: str) -> None:
    fault = server.faults.add(Status(match=match, status=503, text="service unavailable"))
    read_whole(expecting(server))
    assert fault.hits == 1


@pytest.mark.parametrize("match", [MANIFEST, INDEX])
def test_damage_in_what_was_asked_ahead_is_fetched_again_before_it_counts(
    server: ReferenceServer, match: str
) -> None:
    fault = server.faults.add(Corrupt(match=match))
    read_whole(expecting(server))
    assert fault.hits == 1
    assert server.requests.count(match) > 1


@pytest.mark.parametrize(
    "limits", [replace(DEFAULT, max_ahead=4096), replace(DEFAULT, ahead_kept=0.0)], ids=["large", "old"]
)
def test_a_large_index_and_an_old_answer_are_asked_for_when_they_are_needed(
    server: ReferenceServer, limits: ServerLimits
) -> None:
    read_whole(expecting(server, limits=limits))
    assert server.requests.count(INDEX) == 2


def test_an_index_that_is_not_there_is_no_reason_to_fail(server: ReferenceServer) -> None:
    source = source_of(server, TOKEN)
    expected = expected_at(f"{FIRST}/none.img", ROOT_NAMESPACE, reads=True)
    source.expect(replace(expected, snapshot=FIRST))
    read_whole(source)
    assert server.requests.count("none.img.fidx") == 1


@pytest.mark.parametrize("held", [SESSION, MANIFEST, INDEX])
def test_what_was_asked_ahead_ends_with_the_source_and_leaves_no_session(
    server: ReferenceServer, held: str
) -> None:
    async def main() -> None:
        hold = server.faults.add(Hold(match=held))
        async with reading(expecting(server)):
            await until(lambda: hold.hits)
        hold.release()
        with trio.fail_after(LIMIT):
            await until(lambda: server.open_connections == 0)
            await until(lambda: not server.open_sessions())

    trio.run(main)


def test_nothing_expected_asks_for_nothing(server: ReferenceServer) -> None:
    async def main() -> None:
        source = source_of(server, TOKEN)
        source.expect(Expected())
        async with reading(source):
            pass

    trio.run(main)
    assert [record.path.rpartition("/")[2] for record in server.requests.all()] == ["namespace"]
    assert server.connections == 1


def test_an_image_that_is_opened_later_has_its_session_opened_beside_its_manifest(
    server: ReferenceServer,
) -> None:
    rounds = [[NAMESPACES], [GROUPS], [SNAPSHOTS], [MANIFEST, SESSION], [INDEX], [CHUNK]]
    run_in_rounds(server, source_of(server, TOKEN), rounds, first_byte, connections=1)


def test_an_image_that_is_open_needs_no_session_to_be_opened_again(server: ReferenceServer) -> None:
    limits = replace(DEFAULT, idle_time=0.01)

    async def main() -> None:
        async with reading(source_of(server, TOKEN, limits=limits)) as reader:
            node = await Tree(reader).find(PATH)
            assert isinstance(node, ImageFile)
            image = await node.open()
            await until(lambda: not server.open_sessions())
            assert await node.open() is image
        assert server.requests.count(SESSION) == 1

    trio.run(main)


def test_an_image_whose_key_is_missing_opens_no_session(tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "datastore")
    key = Key(bytes(range(32)))
    writer.add_snapshot(
        FIRST, {"drive-scsi0.img.fidx": CONTENT}, chunk_size=1 << 16, crypt_mode=CryptMode.ENCRYPT, key=key
    )

    async def main() -> None:
        with serving.served(writer.path) as server:
            async with reading(source_of(server, TOKEN)) as reader:
                with pytest.raises(KeyRequiredError):
                    await first_byte(reader)
            assert server.requests.count(SESSION) == 0

    trio.run(main)

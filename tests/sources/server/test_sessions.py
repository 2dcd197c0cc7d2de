"""Reader sessions: opened when something is read, shared, bounded, and gone when nobody reads."""

from __future__ import annotations

import functools
import gc
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from pbsfs.base.errors import PbsfsError, SourceError
from pbsfs.base.names import MANIFEST
from pbsfs.formats.index import FixedIndex
from pbsfs.sources.server.limits import DEFAULT, ServerLimits
from pbsfs.sources.server.source import ServerSource
from pbsfs.testing.writer import DatastoreWriter
from pbsfs.tree import BlobFile, Directory, Tree
from tests.sources.server import serving
from tests.sources.server.serving import (
    CHUNK,
    CONTENT,
    FIRST,
    IMAGE,
    NEWER_CONTENT,
    OTHER_CONTENT,
    OTHER_IMAGE,
    SECOND,
    STREAM,
    STREAM_CONTENT,
    image_of,
    opened,
    read_all,
    reading,
    source_of,
    until,
)
from tests.support import made
from tests.support.server import Hold, ReferenceServer, SlowLink, Stall, Status

READER = "/api2/json/reader"


def session_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pbsfs-session"]


@pytest.fixture(autouse=True)
def nothing_is_left(server: ReferenceServer) -> Iterator[None]:
    """No test leaves a session, or a thread of one."""
    yield
    trio.run(until, lambda: not server.open_sessions() and not session_threads())


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty snapshots."""
    writer = DatastoreWriter(tmp_path_factory.mktemp("many") / "datastore")
    for number in range(40):
        writer.add_snapshot(
            made.snapshot(str(number)), {IMAGE.filename: content_of(number)}, chunk_size=CHUNK
        )
    return writer.path


def content_of(number: int) -> bytes:
    return made.image(number, "rr", tail=number)


# --- when there is one


def test_listing_everything_opens_no_session(server: ReferenceServer) -> None:
    async def walk(node: Directory) -> int:
        found = 0
        for child in (await node.children()).values():
            await child.stat()
            await child.facts()
            found += 1 + (await walk(child) if isinstance(child, Directory) else 0)
        return found

    async def main() -> int:
        async with reading(source_of(server)) as reader:
            return await walk(Tree(reader).root)

    assert trio.run(main) > 8
    assert server.sessions.all() == []


def test_reading_configurations_opens_no_session(server: ReferenceServer) -> None:
    async def main() -> bytes:
        async with reading(source_of(server)) as reader:
            await reader.source.fetch_file(FIRST, MANIFEST, 1 << 20)
            file = await Tree(reader).find("vm/100/2023-11-14T22:13:20Z/qemu-server.conf")
            assert isinstance(file, BlobFile)
            return await file.read()

    assert trio.run(main) == serving.CONFIG_CONTENT
    assert server.sessions.all() == []


def test_a_read_opens_a_session_as_the_user_that_was_given(server: ReferenceServer) -> None:
    async def main() -> None:
        async with reading(source_of(server, serving.TOKEN)) as reader:
            await read_all(await image_of(reader))
            (session,) = server.open_sessions()
            assert (session.user, session.snapshot) == (serving.TOKEN, FIRST)
            assert server.sessions.locks() == {FIRST: 1}

    trio.run(main)


def test_all_images_of_a_snapshot_share_its_session_and_another_snapshot_has_its_own(
    server: ReferenceServer,
) -> None:
    async def main() -> None:
        async with reading(source_of(server)) as reader:
            for archive, content in [
                (IMAGE, CONTENT),
                (OTHER_IMAGE, OTHER_CONTENT),
                (STREAM, STREAM_CONTENT),
            ]:
                assert await read_all(await image_of(reader, archive=archive)) == content
            assert [session.snapshot for session in server.open_sessions()] == [FIRST]
            assert await read_all(await image_of(reader, SECOND)) == NEWER_CONTENT
            assert [session.snapshot for session in server.open_sessions()] == [FIRST, SECOND]

    trio.run(main)


def test_many_who_start_at_once_share_one_session(server: ReferenceServer) -> None:
    async def main() -> None:
        near = ServerLimits(short_round_trip=serving.LIMIT)
        async with opened(source_of(server, connections=None, limits=near)) as source:
            async with trio.open_nursery() as nursery:
                for _reader in range(20):
                    nursery.start_soon(source.fetch_file, FIRST, IMAGE, 1 << 20)
                    nursery.start_soon(source.fetch_file, FIRST, STREAM, 1 << 20)
            assert len(server.sessions.all()) == 1

    trio.run(main)


# --- when it ends


def test_an_idle_session_is_closed_and_the_next_read_opens_another(server: ReferenceServer) -> None:

    async def main() -> None:
        async with reading(source_of(server, limits=ServerLimits(idle_time=0.02))) as reader:
            image = await image_of(reader)
            for turn in range(3):
                assert await image.read(turn * CHUNK, CHUNK) == CONTENT[turn * CHUNK :][:CHUNK]
                await until(lambda: not server.open_sessions())
                assert server.sessions.locks() == {}
            await until(lambda: not session_threads())

    trio.run(main)
    assert 3 <= len(server.sessions.all()) <= 6


def test_a_session_that_waits_for_an_answer_is_not_idle(server: ReferenceServer) -> None:
    hold = server.faults.add(Hold(match="/chunk"))
    clock = trio.testing.MockClock(rate=0)

    async def main() -> None:
        async with opened(source_of(server)) as source, trio.open_nursery() as nursery:
            index = FixedIndex(await source.fetch_file(FIRST, IMAGE, 1 << 20))
            nursery.start_soon(source.fetch_chunk, FIRST, IMAGE, index.digest(0), 1 << 20)
            while not hold.hits:
                await trio.lowlevel.checkpoint()
            for _turn in range(5):  # of the loop that looks for idle ones
                clock.jump(DEFAULT.idle_time)
                await trio.testing.wait_all_tasks_blocked()
            assert len(server.open_sessions()) == 1
            hold.release()

    trio.run(main, clock=clock)


def test_a_session_is_kept_while_it_is_used_now_and_then(server: ReferenceServer) -> None:
    clock = trio.testing.MockClock(rate=0)

    async def main() -> None:
        async with opened(source_of(server)) as source:
            for _turn in range(10):
                await source.fetch_file(FIRST, IMAGE, 1 << 20)
                clock.jump(DEFAULT.idle_time * 0.8)
                await trio.testing.wait_all_tasks_blocked(0.001)
            assert len(server.sessions.all()) == 1
            clock.jump(DEFAULT.idle_time * 2)
            while server.open_sessions():
                await trio.lowlevel.checkpoint()

    trio.run(main, clock=clock)


def test_a_session_that_the_server_ended_is_not_used_again(server: ReferenceServer) -> None:
    async def main() -> None:
        async with reading(source_of(server)) as reader:
            image = await image_of(reader)
            assert await image.read(0, 1) == CONTENT[:1]
            server.restart()
            await until(lambda: not session_threads())
            assert await image.read(CHUNK, CHUNK) == CONTENT[CHUNK : 2 * CHUNK]

    trio.run(main)
    assert len(server.sessions.all()) == 2


# --- how many


class Watch:
    """Counts the sessions that are open on the server at once."""

    def __init__(self, server: ReferenceServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0
        begin = server.sessions.begin

        @functools.wraps(begin)
        def counted(*args: object) -> object:
            session = begin(*args)  # type: ignore[arg-type]
            self.most = max(self.most, len(server.open_sessions()))
            return session

        monkeypatch.setattr(server.sessions, "begin", counted)


@pytest.mark.parametrize("connections", [1, 3])
def test_reading_from_forty_snapshots_at_once_never_holds_more_sessions_than_the_bound(
    many: Path, monkeypatch: pytest.MonkeyPatch, connections: int
) -> None:
    async def main() -> None:
        with serving.served(many) as server:
            watch = Watch(server, monkeypatch)
            async with reading(source_of(server, connections=connections)) as reader:

                async def read(number: int) -> None:
                    image = await image_of(reader, made.snapshot(str(number)))
                    assert await read_all(image) == content_of(number)

                async with trio.open_nursery() as nursery:
                    for number in range(40):
                        nursery.start_soon(read, number)
                assert len(server.open_sessions()) <= DEFAULT.max_sessions
            assert 2 <= watch.most <= DEFAULT.max_sessions
            await until(lambda: not server.open_sessions())

    trio.run(main)


def test_a_snapshot_gets_its_turn_though_others_are_read_without_a_pause(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    async def main() -> None:
        with serving.served(many) as server:
            watch = Watch(server, monkeypatch)
            async with opened(source_of(server, limits=ServerLimits(max_sessions=2, turn=0.02))) as source:

                async def without_a_pause(number: int) -> None:
                    while True:
                        await source.fetch_file(made.snapshot(str(number)), IMAGE, 1 << 20)

                async with trio.open_nursery() as nursery:
                    for number in (0, 0, 0, 1, 1, 1):
                        nursery.start_soon(without_a_pause, number)
                    for number in range(2, 8):
                        with trio.fail_after(serving.LIMIT):
                            await source.fetch_file(made.snapshot(str(number)), IMAGE, 1 << 20)
                    nursery.cancel_scope.cancel()
            assert watch.most == 2

    trio.run(main)


def test_who_waits_for_a_place_gets_it_when_another_fails_to_open(many: Path) -> None:

    async def main() -> None:
        with serving.served(many) as server:
            hold = server.faults.add(Hold(match=f"{READER}?"))
            server.faults.add(Status(match=f"{READER}?", status=403))
            async with opened(source_of(server, limits=ServerLimits(max_sessions=1))) as source:
                failures: list[PbsfsError] = []

                async def fail() -> None:
                    with pytest.raises(SourceError) as caught:
                        await source.fetch_file(made.snapshot("0"), IMAGE, 1 << 20)
                    failures.append(caught.value)

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(fail)
                    await until(lambda: hold.hits)
                    for number in (1, 2, 3):
                        nursery.start_soon(source.fetch_file, made.snapshot(str(number)), IMAGE, 1 << 20)
                    await trio.testing.wait_all_tasks_blocked()
                    hold.release()
                assert len(failures) == 1

    trio.run(main)


def test_who_gives_up_waiting_for_a_place_does_not_take_it(many: Path) -> None:

    async def main() -> None:
        with serving.served(many) as server:
            hold = server.faults.add(Hold(match="/download"))
            async with (
                opened(source_of(server, limits=ServerLimits(max_sessions=1))) as source,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(source.fetch_file, made.snapshot("0"), IMAGE, 1 << 20)
                await until(lambda: hold.hits)
                async with trio.open_nursery() as impatient:
                    for number in (1, 2, 3):
                        impatient.start_soon(source.fetch_file, made.snapshot(str(number)), IMAGE, 1 << 20)
                    await trio.testing.wait_all_tasks_blocked()
                    impatient.cancel_scope.cancel()
                hold.release()
                await source.fetch_file(made.snapshot("4"), IMAGE, 1 << 20)
                assert len(server.sessions.all()) == 2

    trio.run(main)


def test_a_further_connection_that_is_refused_leaves_the_one_there_is_in_use(
    server: ReferenceServer,
) -> None:
    server.faults.add(Status(match=f"{READER}?", skip=1, times=None, status=503))

    async def main() -> None:
        async with reading(source_of(server, connections=4)) as reader:
            assert await read_all(await image_of(reader)) == CONTENT
            assert len(server.open_sessions()) == 1

    trio.run(main)


# --- connections, by the round trip


def peak_of_sessions(server: ReferenceServer, connections: int | None, limits: ServerLimits = DEFAULT) -> int:
    async def main() -> int:
        async with reading(source_of(server, connections=connections, limits=limits)) as reader:
            assert await read_all(await image_of(reader)) == CONTENT
            return len(server.open_sessions())

    return trio.run(main)


def test_there_is_one_connection_where_the_round_trip_is_short(server: ReferenceServer) -> None:
    assert peak_of_sessions(server, None, ServerLimits(short_round_trip=0.5)) == 1


def test_there_are_several_connections_where_the_round_trip_is_long(server: ReferenceServer) -> None:
    server.link = SlowLink(0.05)

    async def main() -> None:
        async with opened(source_of(server, connections=None)) as source:
            await fetch_many(source)
            assert 2 <= len(server.open_sessions()) <= DEFAULT.max_connections

    trio.run(main)


async def fetch_many(source: ServerSource) -> None:
    for _turn in range(8):
        async with trio.open_nursery() as nursery:
            for _reader in range(12):
                nursery.start_soon(source.fetch_file, FIRST, OTHER_IMAGE, 1 << 20)


@pytest.mark.parametrize("connections", [1, 2, 5])
@pytest.mark.parametrize("round_trip", [0, 0.03])
def test_the_setting_fixes_the_number_of_connections(
    server: ReferenceServer, connections: int, round_trip: float
) -> None:
    server.link = SlowLink(round_trip) if round_trip else None

    async def main() -> None:
        async with opened(source_of(server, connections=connections)) as source:
            await fetch_many(source)
            assert len(server.open_sessions()) == connections
            assert len(server.sessions.all()) == connections

    trio.run(main)


# --- requests on a session


def test_several_requests_are_in_flight_on_one_session(server: ReferenceServer) -> None:
    hold = server.faults.add(Hold(match="/chunk", times=None))

    async def main() -> None:
        async with reading(source_of(server)) as reader:
            image = await image_of(reader)

            async def let_go() -> None:
                (session,) = server.open_sessions()
                await until(lambda: session.streams >= 10)
                hold.release()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(let_go)
                assert await read_all(image) == CONTENT
            assert len(server.sessions.all()) == 1

    trio.run(main)


def test_an_answer_that_takes_long_holds_up_no_other(server: ReferenceServer) -> None:
    async def main() -> None:
        async with reading(source_of(server)) as reader:
            image = await image_of(reader)
            hold = server.faults.add(Hold(match=f"/chunk?digest={image.index.digest(0).hex()}"))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(image.read, 0, 1)
                await until(lambda: hold.hits)
                assert await image.read(CHUNK, 5 * CHUNK) == CONTENT[CHUNK : 6 * CHUNK]
                hold.release()
            assert await image.read(0, CHUNK) == CONTENT[:CHUNK]

    trio.run(main)


def test_a_read_that_is_given_up_is_taken_back_and_leaves_the_session_usable(
    server: ReferenceServer,
) -> None:
    async def main() -> None:
        async with opened(source_of(server)) as source:
            await source.fetch_file(FIRST, OTHER_IMAGE, 1 << 20)
            (session,) = server.open_sessions()
            hold = server.faults.add(Hold(match="/download", times=3))
            async with trio.open_nursery() as nursery:
                for _reader in range(3):
                    nursery.start_soon(source.fetch_file, FIRST, IMAGE, 1 << 20)
                await until(lambda: hold.hits == 3)
                nursery.cancel_scope.cancel()
            await until(lambda: session.streams == 0)  # the server was told
            await source.fetch_file(FIRST, IMAGE, 1 << 20)
            assert server.open_sessions() == [session]

    trio.run(main)


@pytest.mark.parametrize("seed", range(3))
def test_giving_up_at_any_moment_leaves_the_source_usable(server: ReferenceServer, seed: int) -> None:
    async def main() -> None:
        async with reading(source_of(server)) as reader:
            info = await serving.info_of(reader)
            file = next(file for file in info.files if file.archive == IMAGE)
            for step in range(60):
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(give_up_after, scope, step * (seed + 1))
                        await reader.source.fetch_file(info.snapshot, IMAGE, 1 << 20)
            image = await reader.open_image(info, file)
            assert await read_all(image) == CONTENT
            assert len(server.open_sessions()) <= 2

    async def give_up_after(scope: trio.CancelScope, checkpoints: int) -> None:
        for _turn in range(checkpoints * 20):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    trio.run(main)


def test_giving_up_while_a_session_opens_takes_effect_at_once(server: ReferenceServer) -> None:
    for fault in (Hold(match=f"{READER}?"), Stall(match=f"{READER}?")):
        server.faults.add(fault)

        async def main(fault: Hold | Stall = fault) -> None:
            async with opened(source_of(server)) as source:
                with trio.fail_after(serving.LIMIT / 4):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(source.fetch_file, FIRST, IMAGE, 1 << 20)
                        await until(lambda: fault.hits)
                        nursery.cancel_scope.cancel()
                await until(lambda: not session_threads())
                server.faults.clear()
                assert await source.fetch_file(FIRST, IMAGE, 1 << 20)

        trio.run(main)


# --- the end


def test_closing_ends_all_sessions_and_their_threads(many: Path) -> None:
    async def main() -> None:
        with serving.served(many) as server:
            async with reading(source_of(server, connections=2)) as reader:
                for number in range(8):
                    await read_all(await image_of(reader, made.snapshot(str(number))))
                assert len(session_threads()) >= 8
            await until(lambda: session_threads() == [])  # they tell of their end a moment before it
            await until(lambda: not server.open_sessions())
            await until(lambda: server.open_connections == 0)

    trio.run(main)


def test_closing_in_the_middle_of_reading_ends_all_sessions_and_their_threads(many: Path) -> None:
    async def main() -> None:
        with serving.served(many) as server:
            hold = server.faults.add(Hold(match="/chunk", times=None))
            async with reading(source_of(server)) as reader:
                images = [await image_of(reader, made.snapshot(str(number))) for number in range(5)]
                async with trio.open_nursery() as nursery:
                    for image in images:
                        nursery.start_soon(read_all, image)
                    await until(lambda: hold.hits >= 5)
                    nursery.cancel_scope.cancel()
            await until(lambda: session_threads() == [])  # they tell of their end a moment before it
            server.faults.clear()
            await until(lambda: not server.open_sessions())

    trio.run(main)


def test_no_session_is_opened_once_the_source_is_closed(server: ReferenceServer) -> None:
    async def main() -> None:
        async with opened(source_of(server)) as source:
            await source.aclose()
            with pytest.raises(SourceError, match="closed"):
                await source.fetch_file(FIRST, IMAGE, 1 << 20)
            await until(lambda: not session_threads())

    trio.run(main)


def test_opening_and_closing_two_hundred_times_leaves_no_descriptor_or_thread(
    server: ReferenceServer,
) -> None:
    async def once(source: ServerSource) -> None:
        async with reading(source) as reader:
            image = await image_of(reader)
            assert await image.read(0, CHUNK) == CONTENT[:CHUNK]

    async def quiet() -> None:
        await until(lambda: not session_threads() and server.open_connections == 0)

    def descriptors() -> int:
        gc.collect()
        return serving.open_descriptors()

    trio.run(once, source_of(server))
    trio.run(quiet)
    before = descriptors()
    threads = threading.active_count()
    for _turn in range(200):
        trio.run(once, source_of(server, serving.TOKEN))
    trio.run(quiet)
    assert descriptors() <= before
    assert threading.active_count() <= threads + 2  # trio keeps worker threads for a while


def test_idle_sessions_over_and_over_leave_no_descriptor(server: ReferenceServer) -> None:

    async def main() -> None:
        async with opened(source_of(server, limits=ServerLimits(idle_time=0.005))) as source:
            counts = []
            for _turn in range(30):
                await source.fetch_file(FIRST, IMAGE, 1 << 20)
                await until(lambda: not server.open_sessions() and not session_threads())
                counts.append(serving.open_descriptors())
            assert max(counts[5:]) <= max(counts[:5]) + 3

    trio.run(main)


# --- a snapshot that is forgotten and made again


@pytest.mark.parametrize("connections", [1, 3])
def test_a_snapshot_made_again_is_read_through_new_sessions(tmp_path: Path, connections: int) -> None:
    path = serving.fill(tmp_path / "datastore")
    content = made.image(71, "r" * 16, tail=777)

    async def main(server: ReferenceServer) -> None:
        async with reading(source_of(server, connections=connections)) as reader:
            info = await serving.info_of(reader)
            file = next(file for file in info.files if file.archive == IMAGE)
            old = await reader.open_image(info, file, 0)
            assert await old.read(0, 9 * CHUNK) == CONTENT[: 9 * CHUNK]
            await until(lambda: len(server.open_sessions()) == connections)
            before = server.sessions.all()
            shutil.rmtree(path / str(FIRST))
            DatastoreWriter(path).add_snapshot(FIRST, {IMAGE.filename: content}, chunk_size=CHUNK)
            new = await reader.open_image(info, file, 0)
            async with trio.open_nursery() as nursery:
                for number in range(16):
                    nursery.start_soon(new.read, number * CHUNK, CHUNK)
            assert await read_all(new) == content
            await until(lambda: not any(session in before for session in server.open_sessions()))
            # The server refuses chunks that only the old index has: that is not damage.
            with pytest.raises(SourceError, match="if the snapshot was made again, open the file again"):
                await old.read(10 * CHUNK, CHUNK)

    with serving.served(path) as server:
        trio.run(main, server)

"""A source behind a cache on disk: what it is asked twice, what is trusted, and reading without it."""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import ParamSpec

import pytest
import trio
import trio.lowlevel

from pbsfs.base.errors import ConnectError, DamageError, OutputError, SourceError
from pbsfs.base.names import CLIENT_LOG, MANIFEST, ROOT_NAMESPACE
from pbsfs.formats import blob
from pbsfs.formats.index import FIXED_MAGIC, HEADER_SIZE
from pbsfs.formats.manifest import CryptMode
from pbsfs.reader.reader import Reader, open_reader
from pbsfs.runtime.stats import COUNTS
from pbsfs.sources.base import SnapshotInfo
from pbsfs.sources.cached.files import INNER, Kind, Name
from pbsfs.sources.cached.limits import CacheLimits
from pbsfs.sources.cached.offline import OfflineSource
from pbsfs.sources.cached.records import Place
from pbsfs.sources.cached.source import CachedSource
from pbsfs.sources.cached.store import DiskCache
from pbsfs.sources.rate import Rate
from tests.support import made
from tests.support.sources import MemorySource, file_of

P = ParamSpec("P")

NAME = "disk.img.fidx"
CONF = "qemu-server.conf.blob"
SNAPSHOT = made.snapshot()
CONTENT = made.image(1, "r0t" * 4, tail=512)
KEYS = {made.KEY.fingerprint: made.KEY}
SIZE = 64 << 20


def in_trio(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Makes an async test a plain one, on the true clock: the cache works in threads, with timeouts."""

    @functools.wraps(test)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        trio.run(lambda: test(*args, **kwargs))

    return wrapper


class Machine:
    """A snapshot in a counted source, and caches in front of it."""

    def __init__(self, directory: Path, mode: CryptMode = CryptMode.NONE) -> None:
        self.source = MemorySource(cheap_files=False)
        self.directory = directory
        self.limits = CacheLimits()
        key = None if mode is CryptMode.NONE else made.KEY
        files = {NAME: CONTENT, CONF: b"cores: 2\n" * 50}
        info = self.source.add(SNAPSHOT, files, crypt_mode=mode, key=key, client_log=b"well\n")
        # As a server lists it.
        self.info = replace(info, files=tuple(replace(file, csum=None) for file in info.files))

    def cached(self, size: int = SIZE) -> CachedSource:
        cache = DiskCache(self.directory, size, self.limits)
        return CachedSource(self.source, cache, "memory of a user", self.limits)

    def offline(self) -> CachedSource:
        cache = DiskCache(self.directory, SIZE)
        return CachedSource(OfflineSource("memory", cache, "memory of a user"), cache, None)

    def entries(self, kind: Kind = Kind.CHUNK) -> list[Path]:
        found = (self.directory / INNER).glob("??/*")
        return [path for path in found if path.suffix == kind.value]


async def read_all(reader: Reader, info: SnapshotInfo) -> bytes:
    image = await reader.open_image(info, file_of(info, NAME))
    assert await reader.read_blob(info, file_of(info, CONF)) == b"cores: 2\n" * 50
    return bytes(await image.handle().read(0, image.size))


async def read_once(machine: Machine, **options: object) -> bytes:
    async with open_reader(machine.cached(), **options) as reader:  # type: ignore[arg-type]
        return await read_all(reader, machine.info)


@in_trio
async def test_a_machine_that_is_read_twice_is_fetched_once(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "cache")
    assert await read_once(machine) == CONTENT
    assert len(machine.source.fetched) == len(machine.entries()) == len(set(machine.source.fetched))
    machine.source.fetched.clear()
    machine.source.calls.clear()
    before, hits = COUNTS.bytes_fetched, COUNTS.disk_cache_hits
    assert await read_once(machine) == CONTENT
    assert not machine.source.fetched
    assert machine.source.calls["fetch_file"] == 1  # the manifest
    manifest = len(machine.source.files[SNAPSHOT, MANIFEST])
    assert COUNTS.bytes_fetched - before == manifest
    assert COUNTS.disk_cache_hits - hits == len(machine.entries()) + 2


@in_trio
async def test_what_is_kept_is_as_it_was_stored(tmp_path: Path) -> None:
    machine = Machine(tmp_path, CryptMode.ENCRYPT)
    assert await read_once(machine, keys=KEYS) == CONTENT
    kept = {path.name: path.read_bytes() for path in machine.entries()}
    assert kept == {digest.hex(): machine.source.chunks[digest] for digest in machine.source.fetched}
    assert all(blob.kind_of(raw).encrypted for raw in kept.values())
    assert await read_once(machine, keys=KEYS) == CONTENT
    with pytest.raises(Exception, match="encrypted"):
        await read_once(machine)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "cut short": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "of another": lambda data: blob.encode(b"other content"),
    "zeros": lambda data: bytes(len(data)),
    "longer": lambda data: data + b"\0" * 4096,
    "large": lambda data: bytes(64 << 20),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("mode", [CryptMode.NONE, CryptMode.ENCRYPT])
def test_bad_entries_are_fetched_again_and_never_damage(tmp_path: Path, name: str, mode: CryptMode) -> None:
    @in_trio
    async def run() -> None:
        machine = Machine(tmp_path, mode)
        keys = KEYS if mode is CryptMode.ENCRYPT else {}
        await read_once(machine, keys=keys)
        good = {path: path.read_bytes() for path in [*machine.entries(), *machine.entries(Kind.FILE)]}
        for path, data in good.items():
            path.write_bytes(DAMAGE[name](data))
        fetched = len(machine.source.fetched)
        machine.source.fetched.clear()
        assert await read_once(machine, keys=keys) == CONTENT
        assert len(machine.source.fetched) == fetched
        assert {path: path.read_bytes() for path in good} == good
        machine.source.fetched.clear()
        assert await read_once(machine, keys=keys) == CONTENT
        assert not machine.source.fetched

    run()


@in_trio
async def test_bad_entries_that_cannot_be_removed_are_not_damage_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path)
    await read_once(machine)
    for path in [*machine.entries(), *machine.entries(Kind.FILE)]:
        path.write_bytes(blob.encode(b"other"))

    def refuse(*_args: object, **_more: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(DiskCache, "drop", refuse)
    monkeypatch.setattr(DiskCache, "put", refuse)
    assert await read_once(machine) == CONTENT


@in_trio
async def test_an_entry_that_another_keeps_spoiling_is_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path)
    await read_once(machine)
    bad = blob.encode(b"other")
    entries = machine.entries()

    def drop(cache: DiskCache, name: Name) -> None:
        """Removes it, and another user puts it back at once."""
        put(cache, name, bad, replace=True)

    put = DiskCache.put
    monkeypatch.setattr(DiskCache, "drop", drop)
    for path in entries:
        path.write_bytes(bad)
    assert await read_once(machine) == CONTENT


@in_trio
async def test_a_bad_entry_that_two_tasks_drop_at_once_is_not_damage(tmp_path: Path) -> None:
    source = Machine(tmp_path).cached()
    source.cache.prepare()
    digest = bytes(32)
    assert source.cache.put(Name(digest, Kind.CHUNK), b"bad")
    looked, gate = [0], trio.Event()

    async def work() -> str:
        if await source.kept_chunk(digest, 100) is None:
            return "from the source"
        looked[0] += 1
        if looked[0] == 2:
            gate.set()
        await gate.wait()  # both have the bad entry
        raise DamageError("bad")

    async def read() -> None:
        found.append(await source.confirmed(work))

    found: list[str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        nursery.start_soon(read)
    assert found == ["from the source"] * 2


@in_trio
async def test_a_bad_entry_is_not_damage_without_the_key_either(tmp_path: Path) -> None:
    machine = Machine(tmp_path, CryptMode.ENCRYPT)
    archive = file_of(machine.info, CONF).archive
    raw = machine.source.files[SNAPSHOT, archive]
    file = replace(file_of(machine.info, CONF), csum=hashlib.sha256(raw).digest())
    async with open_reader(machine.cached()) as reader:
        size = await reader.blob_size(machine.info, file)
    (entry,) = machine.entries(Kind.FILE)
    entry.write_bytes(FIXED_MAGIC + bytes(HEADER_SIZE - len(FIXED_MAGIC)) + raw)
    async with open_reader(machine.cached()) as reader:
        assert await reader.blob_size(machine.info, file) == size
    assert entry.read_bytes() == raw


@in_trio
async def test_a_cache_that_was_removed_is_made_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "cache")
    source = machine.cached()
    async with open_reader(source) as reader:
        os.rename(tmp_path / "cache", tmp_path / "away")
        assert await read_all(reader, machine.info) == CONTENT
        await source.settled()
    assert len(machine.entries()) == len(machine.source.fetched)


@in_trio
async def test_an_entry_larger_than_the_queue_is_kept(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.limits = CacheLimits(queue=1)
    source = machine.cached()
    source.keep_all()
    async with open_reader(source) as reader:
        assert await read_all(reader, machine.info) == CONTENT
        assert await source.settled()
    assert len(machine.entries()) == len(machine.source.fetched)


@in_trio
async def test_closing_writes_no_more_than_its_time_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path)
    machine.limits = CacheLimits(closing=0, writers=1)
    source = machine.cached()
    writing, gate = threading.Event(), threading.Event()
    put = DiskCache.put

    def slow(cache: DiskCache, name: Name, data: bytes, *, replace: bool = False) -> bool:
        writing.set()
        gate.wait(30)
        return put(cache, name, data, replace=replace)

    monkeypatch.setattr(DiskCache, "put", slow)
    async with open_reader(source) as reader:
        assert await read_all(reader, machine.info) == CONTENT
        await trio.to_thread.run_sync(writing.wait)
        threading.Timer(0, gate.set).start()
    assert len([*machine.entries(), *machine.entries(Kind.FILE), *machine.entries(Kind.RECORD)]) <= 3


@in_trio
async def test_what_is_in_the_way_of_an_entry_stops_only_that_one(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    await read_once(machine)
    first, second, *rest = machine.entries()
    for path in (first, second, *rest):
        path.unlink()
    first.mkdir()
    (first / "x").touch()
    if second.parent != first.parent:
        second.parent.rmdir()
        second.parent.symlink_to(tmp_path)
    for _ in range(2):
        assert await read_once(machine) == CONTENT
    assert {path.name for path in machine.entries() if path.is_file()} >= {path.name for path in rest}


@in_trio
async def test_damage_of_the_source_is_damage_and_not_kept(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    digests = [digest for digest, raw in machine.source.chunks.items() if raw]
    for digest in digests:
        machine.source.damage(digest, 200)
    with pytest.raises(DamageError, match="CRC mismatch"):
        await read_once(machine)
    assert not machine.entries()


@in_trio
async def test_a_snapshot_that_was_made_again_shows_its_new_content(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    await read_once(machine)
    other = made.image(2, "r0t" * 4, tail=512)
    machine.source.add(SNAPSHOT, {NAME: other, CONF: b"cores: 2\n" * 50})
    assert await read_once(machine) == other


@in_trio
async def test_an_index_whose_table_was_dropped_comes_from_the_cache(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    async with open_reader(machine.cached()) as reader:
        image = await reader.open_image(machine.info, file_of(machine.info, NAME))
        while not machine.entries(Kind.FILE):
            await trio.lowlevel.checkpoint()
        del machine.source.files[SNAPSHOT, image.archive]
        image.index.drop_table()
        machine.source.files[SNAPSHOT, image.archive] = b""  # MemorySource wants to know it
        assert await image.handle().read(0, image.size) == CONTENT


# --- when the cache can't be used


@in_trio
async def test_a_full_disk_costs_nothing_but_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine(tmp_path)
    writes = []

    def full(*_args: object) -> None:
        writes.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pbsfs.sources.cached.files.CacheFiles.write", full)
    with caplog.at_level(logging.WARNING):
        assert await read_once(machine) == CONTENT
    assert len(writes) <= 2  # one of each writer, and then a pause
    (record,) = caplog.records
    assert record.getMessage() == (
        f"cache {tmp_path}: nothing is kept for now: No space left on device; pbsfs reads from the source "
        "instead: check the directory, its disk and who may write there"
    )
    caplog.clear()
    assert not machine.entries()


@pytest.mark.parametrize("what", ["removed", "a file", "unreadable"])
def test_a_cache_that_vanishes_is_no_error(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    # The cache lies behind a link, which one step replaces: a write under way makes a missing directory.
    directory = tmp_path / "disk"
    directory.mkdir(0o700)
    (tmp_path / "cache").symlink_to(directory)
    (tmp_path / "a file").touch()
    (tmp_path / "unreadable").symlink_to("cache")

    @in_trio
    async def run() -> None:
        machine = Machine(directory if what == "removed" else tmp_path / "cache")
        async with open_reader(machine.cached()) as reader:
            assert await read_all(reader, machine.info) == CONTENT
            if what == "removed":
                os.rename(directory, tmp_path / "away")
            else:
                os.replace(tmp_path / what, tmp_path / "cache")
        async with open_reader(machine.cached()) as reader:
            if what == "removed":
                os.rename(directory, tmp_path / "away again")
            assert await read_all(reader, machine.info) == CONTENT

    with caplog.at_level(logging.WARNING):
        run()
    assert all("pbsfs reads from the source instead" in record.getMessage() for record in caplog.records)
    caplog.clear()


@in_trio
async def test_a_queue_that_is_full_drops_and_delays_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.limits = CacheLimits(queue=0)
    assert await read_once(machine) == CONTENT
    assert not machine.entries()
    fetched = len(machine.source.fetched)
    machine.limits = CacheLimits(queue=80_000)
    source = machine.cached()
    source.keep_all()
    async with open_reader(source) as reader:
        assert await read_all(reader, machine.info) == CONTENT
    assert len(machine.entries()) == fetched


@in_trio
async def test_keeping_all_fails_where_some_of_it_makes_room_for_the_rest(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    source = machine.cached(200 << 10)
    source.keep_all()

    async def keep() -> None:
        async with open_reader(source) as reader:
            await read_all(reader, machine.info)
            await source.settled()

    with pytest.raises(OutputError, match=f"cache {tmp_path}: not everything could be kept; free its disk"):
        await keep()


@in_trio
async def test_keeping_all_fails_where_what_it_found_there_makes_room(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert await read_once(machine) == CONTENT
    source = machine.cached()
    source.keep_all()
    async with open_reader(source) as reader:
        assert await read_all(reader, machine.info) == CONTENT
        source.cache.prune(100_000)
        with pytest.raises(OutputError, match="not everything could be kept"):
            await source.settled()


@in_trio
async def test_keeping_all_may_remove_what_was_there_before(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert await read_once(machine) == CONTENT
    source = machine.cached(700 << 10)
    for number in range(10):  # of another backup
        name = Name(hashlib.sha256(bytes([number])).digest(), Kind.CHUNK)
        assert source.cache.put(name, bytes(65_000))
        path = f"{tmp_path}/{INNER}/{name.shard:02x}/{name}"
        os.utime(path, (1000, 1000))
    source.keep_all()
    async with open_reader(source) as reader:
        assert await read_all(reader, machine.info) == CONTENT
        assert await source.settled() > 0


@in_trio
async def test_keeping_all_fails_where_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    machine = Machine(tmp_path)
    monkeypatch.setattr("pbsfs.sources.cached.files.CacheFiles.write", full)
    source = machine.cached()
    source.keep_all()

    async def keep() -> None:
        async with open_reader(source) as reader:
            for number in range(0, len(CONTENT), 1 << 16):
                image = await reader.open_image(machine.info, file_of(machine.info, NAME))
                await image.handle().read(number, 1)

    with pytest.raises(OutputError, match="not everything could be kept"):
        await keep()
    assert len(set(machine.source.fetched)) < 8
    caplog.clear()


# --- several processes


@in_trio
async def test_two_readers_that_want_a_chunk_at_once_fetch_it_once(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    gate = machine.source.hold("fetch_chunk")
    async with open_reader(machine.cached()) as first, open_reader(machine.cached()) as second:
        results = []

        async def read(reader: Reader) -> None:
            results.append(await read_all(reader, machine.info))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, first)
            while not machine.source.fetched:
                await trio.lowlevel.checkpoint()
            nursery.start_soon(read, second)
            while second.store.cache.size or not COUNTS.disk_cache_misses:
                await trio.lowlevel.checkpoint()
            gate.set()
    assert results == [CONTENT, CONTENT]
    assert len(machine.source.fetched) == len(set(machine.source.fetched))


@in_trio
async def test_a_claim_that_is_never_given_back_costs_one_pause(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.limits = CacheLimits(claim_patience=0.05)
    other = DiskCache(tmp_path, SIZE)
    other.prepare()
    for digest in machine.source.chunks:
        assert other.claims.take(Name(digest, Kind.CHUNK))
    with trio.fail_after(20):
        assert await read_once(machine) == CONTENT


@in_trio
async def test_a_fetch_that_fails_gives_its_claim_back(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.source.fail("fetch_chunk", *[SourceError("no")] * 20)
    async with open_reader(machine.cached()) as reader:
        with pytest.raises(SourceError, match="no"):
            await read_all(reader, machine.info)
        machine.source.fail("fetch_chunk")
        machine.source._failures.clear()
        assert await read_once(machine) == CONTENT


@in_trio
async def test_what_waits_for_its_turn_keeps_no_other_process_waiting(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.limits = replace(machine.limits, claim_patience=60.0)
    slow = machine.cached()
    async with open_reader(machine.cached()) as reader, open_reader(slow) as waiting:
        image = await waiting.open_image(machine.info, file_of(machine.info, NAME))
        slow.rate = Rate(1)  # it never runs, so no turn comes
        async with trio.open_nursery() as nursery:
            nursery.start_soon(image.handle().read, 0, image.size)
            while not slow.rate._waiting:
                await trio.lowlevel.checkpoint()
            with trio.fail_after(20):
                assert await read_all(reader, machine.info) == CONTENT
            nursery.cancel_scope.cancel()
    assert len(machine.source.fetched) == len(set(machine.source.fetched))


@in_trio
async def test_what_another_process_fetched_before_the_turn_came_is_not_fetched_again(
    tmp_path: Path,
) -> None:
    machine = Machine(tmp_path)
    slow = machine.cached()
    async with open_reader(slow) as waiting:
        image = await waiting.open_image(machine.info, file_of(machine.info, NAME))
        slow.rate = Rate(1 << 40)
        misses = COUNTS.disk_cache_misses
        async with trio.open_nursery() as nursery:
            found: list[bytes] = []

            async def read() -> None:
                found.append(bytes(await image.handle().read(0, image.size)))

            nursery.start_soon(read)
            while not slow.rate._waiting:
                await trio.lowlevel.checkpoint()
            assert COUNTS.disk_cache_misses == misses, "counted when they are claimed"
            assert await read_once(machine) == CONTENT
            async with trio.open_nursery() as running:
                running.start_soon(slow.rate.run)
                while not found:
                    await trio.lowlevel.checkpoint()
                running.cancel_scope.cancel()
    assert found == [CONTENT]
    assert len(machine.source.fetched) == len(set(machine.source.fetched))


class Unreachable(MemorySource):
    """A server that can't be reached."""

    async def open(self, nursery: trio.Nursery) -> None:
        raise ConnectError("pbs:8007: Connection refused")


@in_trio
async def test_a_source_that_cannot_be_reached_may_be_readable_offline(
    tmp_path: Path,
) -> None:
    machine = Machine(tmp_path)
    working, machine.source = machine.source, Unreachable(cheap_files=False)

    async def problem() -> str:
        with pytest.raises(ConnectError) as caught:
            async with open_reader(machine.cached()):
                pass
        assert caught.value.retryable
        return str(caught.value)

    assert await problem() == "pbs:8007: Connection refused"
    unreachable, machine.source = machine.source, working
    async with open_reader(machine.cached()) as reader:
        await reader.source.groups(ROOT_NAMESPACE)
    machine.source = unreachable
    assert await problem() == (
        f"pbs:8007: Connection refused; with --offline, pbsfs reads what is kept in cache {tmp_path}"
    )


@in_trio
async def test_a_shared_file_that_cannot_be_put_right_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine(tmp_path)
    (tmp_path / INNER / "usage/full").mkdir(parents=True)
    for _ in range(2):
        assert await read_once(machine) == CONTENT
    said = [record.getMessage() for record in caplog.records]
    assert len(set(said)) == 1
    assert "nothing is kept for now: " in said[0]
    assert "usage: not a regular file; remove it" in said[0]
    caplog.clear()


# --- offline


@in_trio
async def test_offline_what_is_whole_is_read_and_the_rest_is_named(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    other = machine.source.add(made.snapshot("900"), {NAME: made.image(3, "r", tail=1)})
    async with open_reader(machine.cached()) as reader:
        assert await reader.source.namespaces(ROOT_NAMESPACE) == []
        groups = await reader.source.groups(ROOT_NAMESPACE)
        snapshots = await reader.source.snapshots(SNAPSHOT.group)
        assert await read_all(reader, machine.info) == CONTENT
        log = file_of(machine.info, CLIENT_LOG.filename)
        assert await reader.read_blob(machine.info, log) == b"well\n"
    async with open_reader(machine.offline()) as reader:
        source = reader.source
        assert str(source) == "memory (offline)"
        assert await source.namespaces(ROOT_NAMESPACE) == []
        assert await source.groups(ROOT_NAMESPACE) == groups
        assert await source.snapshots(SNAPSHOT.group) == snapshots
        assert await read_all(reader, machine.info) == CONTENT
        assert await reader.read_blob(machine.info, log) == b"well\n"
        with pytest.raises(SourceError, match=r"memory: offline, and .*index.json.blob is not in cache"):
            await reader.open_image(
                replace(other, files=tuple(replace(file, csum=None) for file in other.files)),
                replace(file_of(other, NAME), csum=None),
            )
        with pytest.raises(
            SourceError, match=r"the list of groups in namespace x is not in cache .*; read it once without"
        ):
            await source.groups(ROOT_NAMESPACE.child("x"))
    chunk = machine.entries()[0]
    chunk.unlink()
    async with open_reader(machine.offline()) as reader:
        with pytest.raises(SourceError, match=f"offline, and chunk {chunk.name} is not in cache"):
            await read_all(reader, machine.info)


@in_trio
async def test_offline_records_of_other_users_are_not_believed(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    async with open_reader(machine.cached()) as reader:
        groups = await reader.source.groups(ROOT_NAMESPACE)
    (path,) = machine.entries(Kind.RECORD)
    async with open_reader(machine.offline()) as reader:
        assert await reader.source.groups(ROOT_NAMESPACE) == groups
        path.chmod(0o622)
        with pytest.raises(SourceError, match="is not in cache"):
            await reader.source.groups(ROOT_NAMESPACE)


@in_trio
async def test_offline_a_record_of_another_user_takes_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path)
    async with open_reader(machine.cached()) as reader:
        groups = await reader.source.groups(ROOT_NAMESPACE)
    other = os.geteuid() + 1
    machine.source.add(made.snapshot("900"), {NAME: b"x"})
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: other)
        async with open_reader(machine.cached()) as reader:
            assert await reader.source.groups(ROOT_NAMESPACE) != groups
    async with open_reader(machine.offline()) as reader:
        assert await reader.source.groups(ROOT_NAMESPACE) == groups


@pytest.mark.parametrize("newer", ["own", "root's"])
def test_offline_the_newer_record_of_this_user_and_root_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newer: str
) -> None:
    cache = DiskCache(tmp_path, SIZE)
    cache.prepare()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    place = Place("memory of a user", "namespaces", "")
    own, roots = place.usable
    assert own == place.own
    for name, which in ((own, "own"), (roots, "root's")):
        body = f'["{which[0]}"]'.encode()
        monkeypatch.setattr("time.time", lambda: 2000.0 if which == newer else 1000.0)  # noqa: B023
        cache.put(name, place.pack(body, hashlib.sha256(body).digest()))
    monkeypatch.undo()
    monkeypatch.setattr(Place, "usable", [own, roots])
    source = OfflineSource("memory", cache, "memory of a user")
    assert [str(each) for each in trio.run(source.namespaces, ROOT_NAMESPACE)] == [newer[0]]


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]\n[]", b'{"place": 1, "time": 1}\n[]', b"\xff\n", b"[" * 9999, None]
)
def test_offline_a_record_that_is_not_valid_is_missing(tmp_path: Path, text: bytes | None) -> None:
    """None: one whose end is missing, as after a power failure."""

    @in_trio
    async def run() -> None:
        machine = Machine(tmp_path)
        async with open_reader(machine.cached()) as reader:
            await reader.source.groups(ROOT_NAMESPACE)
        (path,) = machine.entries(Kind.RECORD)
        path.write_bytes(path.read_bytes().rpartition(b"\n")[0] + b"\n[]" if text is None else text)
        async with open_reader(machine.offline()) as reader:
            with pytest.raises(SourceError, match="is not in cache"):
                await reader.source.groups(ROOT_NAMESPACE)

    run()

"""What every source of backups promises: one suite, which each kind of source passes in its own test file.

A test file derives a class `Test…` from `SourceConformance` and says how a source is opened on a
datastore directory; a source behind a server puts the server in between. The tests only know the
interface, and they only make promises that hold for all kinds.
"""

from __future__ import annotations

import abc
import functools
import json
import os
import shutil
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from pbsfs.base.errors import DamageError, NotFoundError
from pbsfs.base.names import CLIENT_LOG, MANIFEST, ROOT_NAMESPACE, Archive, Group, Namespace, Snapshot
from pbsfs.formats import blob
from pbsfs.formats.blob import Stored
from pbsfs.formats.index import DynamicIndex, FixedIndex
from pbsfs.formats.manifest import CryptMode, Manifest
from pbsfs.sources.base import FileInfo, SnapshotInfo, Source
from pbsfs.testing.writer import DatastoreWriter
from tests.support import made
from tests.support.made import DAY, KEY, TIME

T = TypeVar("T")

LIMIT = 1 << 30
IMAGE = Archive("disk.img.fidx")
STREAM = Archive("root.pxar.didx")
CONFIG = Archive("qemu-server.conf.blob")
CONTENT = made.image(1, "rt0r0", chunk_size=1 << 16, tail=700)
FILES: Mapping[str, bytes] = {
    IMAGE.filename: CONTENT,
    STREAM.filename: CONTENT[::-1],
    CONFIG.filename: b"cores: 2\n" * 30,
}

VM = Group(ROOT_NAMESPACE, "vm", "100")
FIRST = VM.snapshot(TIME)


def add(
    writer: DatastoreWriter, snapshot: Snapshot = FIRST, files: Mapping[str, bytes] | None = None
) -> Path:
    """A snapshot with a file of each kind, or with `files`."""
    return writer.add_snapshot(snapshot, FILES if files is None else files, chunk_size=1 << 16)


def stored(writer: DatastoreWriter, archive: Archive, snapshot: Snapshot = FIRST) -> bytes:
    return (writer.snapshot_path(snapshot) / archive.filename).read_bytes()


def chunks_of(writer: DatastoreWriter, archive: Archive, snapshot: Snapshot = FIRST) -> dict[bytes, bytes]:
    """The stored chunks that an index names, by digest."""
    raw = stored(writer, archive, snapshot)
    index = FixedIndex(raw) if archive is IMAGE else DynamicIndex(raw)
    digests = {index.digest(chunk) for chunk in range(index.count)}
    return {digest: writer.chunk_path(digest).read_bytes() for digest in digests}


def files_of(info: SnapshotInfo) -> dict[Archive, FileInfo]:
    return {file.archive: file for file in info.files}


class SourceConformance(abc.ABC):
    """The suite. `writer` (a fixture) fills the datastore that `open` opens."""

    @abc.abstractmethod
    def open(self, datastore: Path) -> AbstractAsyncContextManager[Source]:
        """A source that reads the datastore in the directory `datastore`."""

    def use(self, writer: DatastoreWriter, work: Callable[[Source], Awaitable[T]]) -> T:
        """What `work` returns, given a source."""

        async def main() -> T:
            async with self.open(writer.path) as source:
                return await work(source)

        return trio.run(main)

    # --- space

    def test_the_space_is_that_of_the_file_system_below(self, writer: DatastoreWriter) -> None:
        found, real = self.use(writer, lambda s: s.usage()), os.statvfs(writer.path)
        assert found is not None
        assert found.total == real.f_blocks * real.f_frsize
        assert 0 < found.used < found.total
        assert 0 < found.available <= found.total

    # --- missing chunks

    def test_missing_chunks_are_named_where_that_takes_no_reading(self, writer: DatastoreWriter) -> None:
        add(writer)
        digests = list(chunks_of(writer, IMAGE))
        writer.chunk_path(digests[1]).unlink()
        found = self.use(writer, lambda s: s.missing_chunks(FIRST, digests))
        assert found in (None, [1])

    # --- garbage collection

    def test_the_last_garbage_collection_is_the_noted_one(self, writer: DatastoreWriter) -> None:
        found = self.use(writer, lambda s: s.collection())
        assert found is None or found.time is None
        (writer.path / ".gc-status").write_text(json.dumps(made.COLLECTION))
        found = self.use(writer, lambda s: s.collection())
        assert found is not None
        assert (found.time, found.bad_chunks) == (TIME, 2)
        assert (found.indexed_size, found.stored_size, found.pending_size) == (9000, 3000, 500)

    # --- listing

    def test_an_empty_datastore_has_nothing_and_that_is_no_error(self, writer: DatastoreWriter) -> None:
        assert self.use(writer, lambda s: s.namespaces(ROOT_NAMESPACE)) == []
        assert self.use(writer, lambda s: s.groups(ROOT_NAMESPACE)) == []

    def test_namespaces_are_listed_a_level_at_a_time_in_order(self, writer: DatastoreWriter) -> None:
        for name in ("prod", "prod/db", "prod/db/eu", "prod/app", "Test", "a"):
            add(writer, made.snapshot(namespace=Namespace.parse(name)), {})

        async def work(source: Source) -> list[list[str]]:
            parents = [
                ROOT_NAMESPACE,
                Namespace.parse("prod"),
                Namespace.parse("prod/db"),
                Namespace.parse("a"),
            ]
            return [[str(found) for found in await source.namespaces(parent)] for parent in parents]

        assert self.use(writer, work) == [["Test", "a", "prod"], ["prod/app", "prod/db"], ["prod/db/eu"], []]

    def test_the_deepest_namespace_is_listed_and_has_no_children(self, writer: DatastoreWriter) -> None:
        deepest = Namespace.parse("a/b/c/d/e/f/g")
        add(writer, made.snapshot(namespace=deepest), {})

        assert self.use(writer, lambda s: s.namespaces(Namespace.parse("a/b/c/d/e/f"))) == [deepest]
        assert self.use(writer, lambda s: s.namespaces(deepest)) == []
        groups = self.use(writer, lambda s: s.groups(deepest))
        assert [str(info.group) for info in groups] == ["".join(f"ns/{n}/" for n in "abcdefg") + "vm/100"]

    def test_groups_are_listed_by_type_and_then_by_id(self, writer: DatastoreWriter) -> None:
        for kind, backup_id in [("host", "b"), ("host", "a"), ("ct", "9"), ("vm", "20"), ("vm", "100")]:
            add(writer, made.snapshot(backup_id, type=kind), {})
        found = self.use(writer, lambda s: s.groups(ROOT_NAMESPACE))

        assert [str(info.group) for info in found] == ["vm/100", "vm/20", "ct/9", "host/a", "host/b"]

    def test_a_group_tells_its_owner_its_newest_backup_and_how_many_there_are(
        self, writer: DatastoreWriter
    ) -> None:
        for day in (1, 0, 2):
            writer.add_snapshot(VM.snapshot(TIME + day * DAY), {}, owner="backup@pbs!token")
        (info,) = self.use(writer, lambda s: s.groups(ROOT_NAMESPACE))

        assert info.owner == "backup@pbs!token"
        assert info.last_backup == TIME + 2 * DAY
        assert info.snapshot_count == 3

    def test_a_namespace_lists_its_own_groups_and_no_others(self, writer: DatastoreWriter) -> None:
        prod = Namespace.parse("prod")
        for namespace, backup_id in [(ROOT_NAMESPACE, "1"), (prod, "2"), (prod.child("db"), "3")]:
            add(writer, made.snapshot(backup_id, namespace=namespace), {})

        async def work(source: Source) -> list[list[str]]:
            return [
                [info.group.id for info in await source.groups(namespace)]
                for namespace in (ROOT_NAMESPACE, prod, prod.child("db"))
            ]

        assert self.use(writer, work) == [["1"], ["2"], ["3"]]

    def test_one_name_in_two_namespaces_is_two_groups(self, writer: DatastoreWriter) -> None:
        there = made.snapshot(namespace=Namespace((VM.id,)), time=TIME + DAY)
        add(writer, FIRST)
        add(writer, there, {CONFIG.filename: b"another"})

        async def work(source: Source) -> None:
            assert [info.snapshot for info in await source.snapshots(VM)] == [FIRST]
            assert [info.snapshot for info in await source.snapshots(there.group)] == [there]
            assert await source.fetch_file(there, CONFIG, LIMIT) == stored(writer, CONFIG, there)
            assert await source.fetch_file(FIRST, CONFIG, LIMIT) == stored(writer, CONFIG)

        self.use(writer, work)

    def test_snapshots_are_listed_oldest_first(self, writer: DatastoreWriter) -> None:
        times = [TIME + DAY, TIME, TIME + 400 * DAY, TIME + 1]
        for time in times:
            add(writer, VM.snapshot(time), {})
        found = self.use(writer, lambda s: s.snapshots(VM))

        assert [info.snapshot for info in found] == [VM.snapshot(time) for time in sorted(times)]
        assert all(info.error is None for info in found)

    def test_a_snapshot_tells_its_files_and_their_sizes(self, writer: DatastoreWriter) -> None:
        add(writer)
        (info,) = self.use(writer, lambda s: s.snapshots(VM))
        manifest = Manifest.parse(blob.decode(stored(writer, MANIFEST), max_size=1 << 20))
        files = files_of(info)

        assert len(files) == len(info.files)
        assert {archive: file.size for archive, file in files.items()} == {
            IMAGE: len(CONTENT),
            STREAM: len(CONTENT),
            CONFIG: len(stored(writer, CONFIG)),
            MANIFEST: len(stored(writer, MANIFEST)),
        }
        assert {file.crypt_mode for file in info.files} == {CryptMode.NONE}
        for entry in manifest.files:
            assert files[entry.archive].csum in (None, entry.csum)

    @pytest.mark.parametrize("mode", [CryptMode.ENCRYPT, CryptMode.SIGN_ONLY])
    def test_a_snapshot_tells_how_it_is_encrypted_and_by_which_key(
        self, writer: DatastoreWriter, mode: CryptMode
    ) -> None:
        writer.add_snapshot(FIRST, FILES, crypt_mode=mode, key=KEY, chunk_size=1 << 16)
        (info,) = self.use(writer, lambda s: s.snapshots(VM))
        files = files_of(info)

        assert info.key_fingerprint == KEY.fingerprint
        assert {files[archive].crypt_mode for archive in (IMAGE, STREAM, CONFIG)} == {mode}
        assert files[MANIFEST].crypt_mode in (CryptMode.NONE, CryptMode.SIGN_ONLY)  # it has a signature

    def test_a_snapshot_tells_owner_notes_protection_and_verify_state(self, writer: DatastoreWriter) -> None:
        writer.add_snapshot(FIRST, {})
        writer.add_snapshot(
            VM.snapshot(TIME + 1), {}, notes="two\nlines é", verify_state="failed", protected=True
        )
        bare, full = self.use(writer, lambda s: s.snapshots(VM))

        assert (bare.owner, full.owner) == ("root@pam", "root@pam")
        assert (bare.notes or None, bare.verify_state, bare.protected) == (None, None, False)
        assert (full.verify_state, full.protected) == ("failed", True)
        assert full.notes in ("two\nlines é", "two")  # a list may have the first line only
        assert bare.key_fingerprint is None

    def test_a_client_log_is_listed_though_no_manifest_names_it(self, writer: DatastoreWriter) -> None:
        writer.add_snapshot(FIRST, {}, client_log=b"it went well\n")
        (info,) = self.use(writer, lambda s: s.snapshots(VM))

        log = files_of(info)[CLIENT_LOG]
        assert (log.crypt_mode, log.csum) == (None, None)
        assert log.size in (len(stored(writer, CLIENT_LOG)), 0)  # a list may not know it
        raw = self.use(writer, lambda s: s.fetch_file(FIRST, CLIENT_LOG, LIMIT))
        assert blob.decode(raw, max_size=100) == b"it went well\n"

    def test_a_snapshot_is_listed_once_it_is_finished(
        self, writer: DatastoreWriter, caplog: pytest.LogCaptureFixture
    ) -> None:
        add(writer)
        manifest = add(writer, VM.snapshot(TIME + 1)) / MANIFEST.filename
        text = manifest.read_bytes()
        manifest.unlink()

        async def work(source: Source) -> list[list[int]]:
            unfinished = [info.snapshot.time for info in await source.snapshots(VM)]
            manifest.write_bytes(text)
            return [unfinished, [info.snapshot.time for info in await source.snapshots(VM)]]

        assert self.use(writer, work) == [[TIME], [TIME, TIME + 1]]
        caplog.clear()  # a source may tell of it

    # --- fetching

    def test_a_fetched_file_is_the_bytes_that_are_stored(self, writer: DatastoreWriter) -> None:
        add(writer)

        async def work(source: Source) -> dict[Archive, bytes]:
            (info,) = await source.snapshots(VM)
            return {f.archive: await source.fetch_file(FIRST, f.archive, LIMIT) for f in info.files}

        fetched = self.use(writer, work)
        assert fetched == {name: stored(writer, name) for name in (IMAGE, STREAM, CONFIG, MANIFEST)}

    @pytest.mark.parametrize("archive", [IMAGE, STREAM])
    def test_a_fetched_chunk_is_the_blob_that_is_stored(
        self, writer: DatastoreWriter, archive: Archive
    ) -> None:
        add(writer)
        chunks = chunks_of(writer, archive)

        async def work(source: Source) -> dict[bytes, Stored]:
            return {digest: await source.fetch_chunk(FIRST, archive, digest, LIMIT) for digest in chunks}

        assert len(chunks) > 2
        assert self.use(writer, work) == chunks

    def test_a_snapshot_can_be_read_without_having_been_listed(self, writer: DatastoreWriter) -> None:
        add(writer)
        digest, chunk = next(iter(chunks_of(writer, IMAGE).items()))

        assert self.use(writer, lambda s: s.fetch_file(FIRST, IMAGE, LIMIT)) == stored(writer, IMAGE)
        assert self.use(writer, lambda s: s.fetch_chunk(FIRST, IMAGE, digest, LIMIT)) == chunk

    @pytest.mark.parametrize("archive", [IMAGE, CONFIG, MANIFEST])
    def test_a_file_of_just_the_limit_is_fetched_and_one_byte_more_is_refused(
        self, writer: DatastoreWriter, archive: Archive
    ) -> None:
        add(writer)
        expected = stored(writer, archive)

        assert self.use(writer, lambda s: s.fetch_file(FIRST, archive, len(expected))) == expected
        with pytest.raises(DamageError):
            self.use(writer, lambda s: s.fetch_file(FIRST, archive, len(expected) - 1))
        with pytest.raises(DamageError):
            self.use(writer, lambda s: s.fetch_file(FIRST, archive, 0))

    def test_a_chunk_of_just_the_limit_is_fetched_and_one_byte_more_is_refused(
        self, writer: DatastoreWriter
    ) -> None:
        add(writer)
        digest, expected = max(chunks_of(writer, IMAGE).items(), key=lambda item: len(item[1]))

        assert self.use(writer, lambda s: s.fetch_chunk(FIRST, IMAGE, digest, len(expected))) == expected
        with pytest.raises(DamageError):
            self.use(writer, lambda s: s.fetch_chunk(FIRST, IMAGE, digest, len(expected) - 1))

    # --- what is not there

    def test_a_namespace_that_does_not_exist_is_named_with_those_that_do(
        self, writer: DatastoreWriter
    ) -> None:
        for name in ("prod/db", *(f"n{number}" for number in range(9))):
            add(writer, made.snapshot(namespace=Namespace.parse(name)), {})
        many = "n0, n1, n2, n3, n4, n5, n6, n7, … (10 in all)"
        for name, there in (("prod/none", "prod/db"), ("none", many), ("no/such", many)):
            with pytest.raises(NotFoundError) as caught:
                self.use(writer, functools.partial(self._namespaces, Namespace.parse(name)))
            assert str(caught.value).endswith(f": there is no namespace '{name}'; there is {there}")
        with pytest.raises(NotFoundError, match="'prod/db/none'; there is none"):
            self.use(writer, lambda s: s.namespaces(Namespace.parse("prod/db/none")))

    @staticmethod
    async def _namespaces(parent: Namespace, source: Source) -> list[Namespace]:
        return await source.namespaces(parent)

    def test_what_does_not_exist_is_said_not_to_exist(self, writer: DatastoreWriter) -> None:
        add(writer)
        nowhere = Namespace.parse("no/where")
        questions: list[Callable[[Source], Awaitable[object]]] = [
            lambda s: s.namespaces(Namespace.parse("nowhere")),
            lambda s: s.namespaces(nowhere),
            lambda s: s.groups(Namespace.parse("nowhere")),
            lambda s: s.groups(nowhere),
            lambda s: s.snapshots(Group(ROOT_NAMESPACE, "vm", "101")),
            lambda s: s.snapshots(Group(ROOT_NAMESPACE, "ct", "100")),
            lambda s: s.snapshots(Group(nowhere, "vm", "100")),
            lambda s: s.fetch_file(VM.snapshot(TIME + 1), IMAGE, LIMIT),
            lambda s: s.fetch_file(Group(ROOT_NAMESPACE, "vm", "101").snapshot(TIME), IMAGE, LIMIT),
            lambda s: s.fetch_file(Group(nowhere, "vm", "100").snapshot(TIME), IMAGE, LIMIT),
            lambda s: s.fetch_file(FIRST, Archive("disk.img.didx"), LIMIT),
            lambda s: s.fetch_file(FIRST, CLIENT_LOG, LIMIT),
        ]

        async def work(source: Source) -> None:
            for question in questions:
                with pytest.raises(NotFoundError):
                    await question(source)

        self.use(writer, work)

    def test_a_chunk_that_is_missing_is_damage_and_is_named(self, writer: DatastoreWriter) -> None:
        add(writer)
        lost, kept = list(chunks_of(writer, IMAGE).items())[:2]
        writer.chunk_path(lost[0]).unlink()

        async def work(source: Source) -> Stored:
            with pytest.raises(DamageError, match=lost[0].hex()):
                await source.fetch_chunk(FIRST, IMAGE, lost[0], LIMIT)
            return await source.fetch_chunk(FIRST, IMAGE, kept[0], LIMIT)

        assert self.use(writer, work) == kept[1]

    # --- a datastore that changes

    def test_a_forgotten_snapshot_is_gone_and_its_neighbours_stay(self, writer: DatastoreWriter) -> None:
        snapshots = [VM.snapshot(TIME + n) for n in range(3)]
        for snapshot in snapshots:
            add(writer, snapshot)

        async def work(source: Source) -> None:
            assert [info.snapshot for info in await source.snapshots(VM)] == snapshots
            shutil.rmtree(writer.snapshot_path(snapshots[1]))
            assert [info.snapshot for info in await source.snapshots(VM)] == [snapshots[0], snapshots[2]]
            with pytest.raises(NotFoundError):
                await source.fetch_file(snapshots[1], CONFIG, LIMIT)
            assert await source.fetch_file(snapshots[2], CONFIG, LIMIT)

        self.use(writer, work)

    def test_a_forgotten_group_is_gone(self, writer: DatastoreWriter) -> None:
        add(writer)
        add(writer, made.snapshot("101"))

        async def work(source: Source) -> list[str]:
            assert len(await source.groups(ROOT_NAMESPACE)) == 2
            shutil.rmtree(writer.group_path(VM))
            with pytest.raises(NotFoundError):
                await source.snapshots(VM)
            return [info.group.id for info in await source.groups(ROOT_NAMESPACE)]

        assert self.use(writer, work) == ["101"]

    def test_new_snapshots_groups_and_namespaces_are_seen_at_once(self, writer: DatastoreWriter) -> None:
        add(writer)
        second = VM.snapshot(TIME + DAY)
        prod = Namespace.parse("prod")
        other = made.snapshot("7", type="ct", namespace=prod)

        async def work(source: Source) -> None:
            assert len(await source.snapshots(VM)) == 1
            assert await source.namespaces(ROOT_NAMESPACE) == []
            add(writer, second)
            add(writer, other)
            assert [info.snapshot for info in await source.snapshots(VM)] == [FIRST, second]
            assert [info.last_backup for info in await source.groups(ROOT_NAMESPACE)] == [TIME + DAY]
            assert await source.namespaces(ROOT_NAMESPACE) == [prod]
            assert [info.group for info in await source.groups(prod)] == [other.group]
            assert await source.fetch_file(other, CONFIG, LIMIT) == stored(writer, CONFIG, other)

        self.use(writer, work)

    def test_notes_and_protection_that_change_are_seen(self, writer: DatastoreWriter) -> None:
        add(writer, files={})
        twin = DatastoreWriter(writer.path.with_name("twin"))
        changed = twin.add_snapshot(FIRST, {}, notes="written later", protected=True)

        async def work(source: Source) -> tuple[SnapshotInfo, SnapshotInfo]:
            (before,) = await source.snapshots(VM)
            for file in changed.iterdir():
                file.replace(writer.snapshot_path(FIRST) / file.name)
            (after,) = await source.snapshots(VM)
            return before, after

        before, after = self.use(writer, work)
        assert (before.notes or None, before.protected) == (None, False)
        assert (after.notes, after.protected) == ("written later", True)

    # --- concurrency, and the end

    def test_concurrent_calls_get_their_own_answers(self, writer: DatastoreWriter) -> None:
        groups = [Group(ROOT_NAMESPACE, "vm", str(100 + n)) for n in range(8)]
        for number, group in enumerate(groups):
            add(writer, group.snapshot(TIME), {CONFIG.filename: b"vm %d\n" % number})
        second = VM.snapshot(TIME + 1)
        add(writer, second)
        shared = [*chunks_of(writer, IMAGE, second).items()]
        answers: dict[tuple[int, int], object] = {}

        async def work(source: Source) -> None:
            async def ask(turn: int, number: int) -> None:
                snapshot = groups[number].snapshot(TIME)
                info = (await source.snapshots(groups[number]))[0]
                raw = await source.fetch_file(snapshot, CONFIG, LIMIT)
                digest, chunk = shared[(turn + number) % len(shared)]
                fetched = await source.fetch_chunk(second, IMAGE, digest, LIMIT)
                answers[turn, number] = (info.snapshot, blob.decode(raw, max_size=100), fetched == chunk)

            async with trio.open_nursery() as nursery:
                for turn in range(10):
                    for number in range(len(groups)):
                        nursery.start_soon(ask, turn, number)

        self.use(writer, work)
        assert answers == {
            (turn, number): (groups[number].snapshot(TIME), b"vm %d\n" % number, True)
            for turn in range(10)
            for number in range(len(groups))
        }

    def test_a_call_that_is_given_up_leaves_the_source_usable(self, writer: DatastoreWriter) -> None:
        add(writer)

        async def work(source: Source) -> bytes:
            with trio.CancelScope() as scope:
                scope.cancel()
                await source.fetch_file(FIRST, IMAGE, LIMIT)
            assert scope.cancelled_caught
            return await source.fetch_file(FIRST, IMAGE, LIMIT)

        assert self.use(writer, work) == stored(writer, IMAGE)

    def test_closing_twice_is_closing(self, writer: DatastoreWriter) -> None:
        async def work(source: Source) -> None:
            await source.namespaces(ROOT_NAMESPACE)
            await source.aclose()
            await source.aclose()

        self.use(writer, work)

    def test_a_source_says_in_one_line_what_it_is(self, writer: DatastoreWriter) -> None:
        async def work(source: Source) -> str:
            return str(source)

        assert self.use(writer, work).isprintable()
        assert self.use(writer, work)

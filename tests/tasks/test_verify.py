"""Verification: each chunk is read once, and the report is the list of what is damaged, and nothing else."""

from __future__ import annotations

import functools
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pbsfs.base.errors import DamageError, SourceError
from pbsfs.base.names import CLIENT_LOG, MANIFEST, Archive, Namespace
from pbsfs.contents.base import Entry
from pbsfs.disks.host import Parser
from pbsfs.disks.remote import RemoteVolume
from pbsfs.formats import index
from pbsfs.formats.index import DynamicIndex, FixedIndex
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import CryptMode
from pbsfs.reader.damage import Range, merged
from pbsfs.reader.reader import open_reader
from pbsfs.runtime.memory import Memory
from pbsfs.sources.base import FileInfo, SnapshotInfo, Source
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.sources.rate import Rate
from pbsfs.tasks.known import ENTRY_SIZE, FIRST_SLOTS, KnownChunks
from pbsfs.tasks.report import Report
from pbsfs.tasks.verify import BAD_SIZE, SHOWN_REASONS, STRIDE, WORKERS, Verification
from pbsfs.testing.writer import DatastoreWriter
from pbsfs.tree import ContentsNode, File, Tree
from tests.sources.server.serving import served, source_of
from tests.support import damage, made
from tests.support.run import in_trio, until
from tests.support.sources import CHUNK_SIZE, MemorySource, TimedSource
from tests.support.truth import FILES

SNAPSHOT = made.snapshot()
NEWER = made.snapshot(time=made.TIME + made.DAY)
KEYS = {made.KEY.fingerprint: made.KEY}


def nobody_asks(_count: int) -> None:
    """What the progress is told to when nobody watches it."""


async def verified(
    source: Source,
    *paths: str,
    keys: Mapping[str, Key] | None = None,
    stride: int = STRIDE,
    advance: Callable[[int], None] = nobody_asks,
    shows_files: bool = False,
) -> Report:
    """The report on what is at and below `paths`, or on everything."""
    async with open_reader(source, keys=keys) as reader:
        tree = Tree(reader, files=shows_files)
        run = Verification(reader.store.memory, stride=stride)
        files: dict[bytes, File | ContentsNode] = {}
        for path in paths or ("",):
            files |= {file.path: file for file in await run.collect(await tree.find(path))}
        return await run.run(list(files.values()), advance)


def found_in(report: Report) -> dict[str, list[Range]]:
    """Path and ranges of what is damaged; no path may be told of twice."""
    assert len({found.path for found in report.damaged}) == len(report.damaged)
    return {found.path: found.ranges for found in report.damaged}


def reason_of(report: Report, path: str) -> str:
    return next(found.reason for found in report.damaged if found.path == path)


# --- what is read, and how


@in_trio
async def test_each_chunk_is_read_once_however_many_images_share_it() -> None:
    source = MemorySource()
    first, second = made.image(1, "rr0rr", tail=9), made.image(1, "rr0rr", tail=9) + made.image(2, "r")
    source.add(SNAPSHOT, {"a.img.fidx": first, "b.img.fidx": first + first, "c.pxar.didx": first})
    source.add(NEWER, {"a.img.fidx": second, "x.conf.blob": b"x"})
    source.add(made.snapshot("7", namespace=Namespace(("prod",))), {"a.img.fidx": first})
    report = await verified(source)
    assert Counter(source.fetched).most_common(1)[0][1] == 1
    wanted = {digest for digest in source.chunks if digest != source.add_chunk(bytes(CHUNK_SIZE))}
    # A stream tells of no holes: of all the chunks, that of zeros is read for it alone.
    assert set(source.fetched) == wanted | {source.add_chunk(bytes(CHUNK_SIZE))}
    assert report.chunks == len(source.fetched)
    assert report.files == 6 + 3  # with a manifest for each snapshot
    assert (report.damaged, report.unverified) == ([], {})


@in_trio
async def test_with_too_little_memory_chunks_are_read_again_and_all_damage_is_found() -> None:
    source = MemorySource()
    content = made.image(1, "r" * 40)
    source.add(SNAPSHOT, {"a.img.fidx": content})
    source.add(NEWER, {"a.img.fidx": content})
    numbers = [0, 17, 39]
    for number in numbers:
        source.damage(source.add_chunk(content[number * CHUNK_SIZE :][:CHUNK_SIZE]), 700)
    async with open_reader(source) as reader:
        memory = Memory()
        known = KnownChunks(memory, 2 * FIRST_SLOTS * ENTRY_SIZE, tables=1)
        run = Verification(memory, known=known)
        reader.store.cache.resize(0)
        report = await run.run(await run.collect(Tree(reader).root), nobody_asks)
    assert report.chunks > 40
    assert Counter(source.fetched).most_common(1)[0][1] == 2
    ranges = [Range(number * CHUNK_SIZE, CHUNK_SIZE) for number in numbers]
    assert found_in(report) == {f"{SNAPSHOT}/a.img": ranges, f"{NEWER}/a.img": ranges}


@in_trio
async def test_much_damage_is_charged_and_its_reasons_are_not_all_named() -> None:
    source = MemorySource()
    count = SHOWN_REASONS + 20
    content = made.image(1, "r" * count)
    source.add(SNAPSHOT, {"a.img.fidx": content})
    for number in range(count):
        source.damage(source.add_chunk(content[number * CHUNK_SIZE :][:CHUNK_SIZE]), 700)
    async with open_reader(source) as reader:
        run = Verification(reader.store.memory)
        report = await run.run(await run.collect(Tree(reader).root), nobody_asks)
        assert reader.store.memory.charged("damaged chunks") == count * BAD_SIZE
    assert found_in(report) == {f"{SNAPSHOT}/a.img": [Range(0, count * CHUNK_SIZE)]}
    reason = reason_of(report, f"{SNAPSHOT}/a.img")
    assert reason.count("; ") == SHOWN_REASONS
    assert reason.endswith(f"; … ({count} in all)")


@in_trio
async def test_what_is_read_is_counted_and_holes_are_not_read() -> None:
    source = MemorySource()
    source.add(SNAPSHOT, {"a.img.fidx": made.image(1, "r00rt0", tail=77)})
    report = await verified(source)
    assert (report.chunks, report.size) == (4, 3 * CHUNK_SIZE + 77)
    assert source.calls["fetch_chunk"] == 4


@in_trio
async def test_several_chunks_are_under_way_at_once_and_no_more_than_that() -> None:
    source = MemorySource()
    source.add(SNAPSHOT, {"a.img.fidx": made.image(1, "r" * 40)})
    gate = source.hold("fetch_chunk")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(verified, source)
        await until(lambda: source.in_flight == WORKERS)  # the index is read in a thread before
        await wait_all_tasks_blocked()
        assert source.in_flight == WORKERS >= 4
        gate.set()
    assert source.peak == WORKERS
    assert len(source.fetched) == 40


@in_trio
async def test_other_tasks_run_while_chunks_that_are_known_are_passed_over() -> None:
    stride = 4
    source = MemorySource()
    content = made.image(1, "r" * 9)
    source.add(SNAPSHOT, {"a.img.fidx": content, "b.img.fidx": content * 8})
    together = most = 0

    def advance(_count: int) -> None:
        nonlocal together, most
        together += 1
        most = max(most, together)

    async def other() -> None:
        nonlocal together
        while True:
            together = 0
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await verified(source, advance=advance, stride=stride)
        nursery.cancel_scope.cancel()
    assert most < 3 * stride


@in_trio
async def test_no_more_is_read_in_a_second_than_the_rate_allows() -> None:
    source = TimedSource()
    source.add(SNAPSHOT, {"a.img.fidx": made.image(1, "rrrr0rr"), "b.img.fidx": made.image(2, "rr")})
    source.rate = Rate(CHUNK_SIZE * 4)
    before = trio.current_time()
    await verified(source)
    expected = [0, 0, 0, 0, 0, 1 / 4, 2 / 4, 3 / 4]  # at first, what comes in a second
    assert [time - before for time in source.asked] == pytest.approx(expected, abs=0.1)  # with the indexes


@in_trio
async def test_without_a_rate_nothing_waits() -> None:
    source = MemorySource()
    source.add(SNAPSHOT, {"a.img.fidx": made.image(1, "r" * 30)})
    before = trio.current_time()
    await verified(source)
    assert trio.current_time() == before


@pytest.mark.parametrize("cheap", [True, False])
@in_trio
async def test_the_progress_comes_to_what_was_announced_whatever_is_damaged(cheap: bool) -> None:
    source = MemorySource(cheap_files=cheap)
    shared = made.image(1, "r0rt", tail=99)
    files = {"a.img.fidx": shared, "b.img.fidx": shared + made.image(2, "r"), "c.conf.blob": b"c" * 500}
    source.add(SNAPSHOT, files)
    source.add(NEWER, files, crypt_mode=CryptMode.ENCRYPT, key=made.KEY)
    source.files[SNAPSHOT, Archive("b.img.fidx")] = b"not an index"
    spoiled = made.image(3, "rr")
    source.add(made.snapshot("7"), {"a.img.fidx": spoiled})
    source.damage(source.add_chunk(spoiled[:CHUNK_SIZE]), 700)
    done: list[int] = []
    async with open_reader(source) as reader:
        run = Verification(reader.store.memory)
        collected = await run.collect(Tree(reader).root)
        announced = sum([(await file.stat()).data_size for file in collected])
        report = await run.run(collected, done.append)
    assert sum(done) == announced > 0
    assert len(report.damaged) == 2


@in_trio
async def test_only_what_is_at_and_below_a_path_is_read() -> None:
    source = MemorySource()
    source.add(SNAPSHOT, {"a.img.fidx": made.image(1, "r"), "b.img.fidx": made.image(2, "r")})
    source.add(NEWER, {"a.img.fidx": made.image(3, "r")})
    report = await verified(source, f"{SNAPSHOT}/a.img")
    assert (report.files, report.chunks) == (1, 1)
    report = await verified(source, "vm/100/latest", f"{NEWER}/a.img")
    assert (report.files, report.chunks) == (2, 1)
    report = await verified(source, "vm/100")
    assert (report.files, report.chunks) == (5, 3)  # `latest` is not one more


# --- what is found


def _directory(path: Path) -> AbstractContextManager[Source]:
    @contextmanager
    def opened() -> Iterator[Source]:
        yield DirectorySource(path)

    return opened()


def _server(path: Path) -> AbstractContextManager[Source]:
    @contextmanager
    def opened() -> Iterator[Source]:
        with served(path) as server:
            yield source_of(server)

    return opened()


SOURCES = {"directory": _directory, "server": _server}


def fill(path: Path) -> dict[str, FixedIndex | DynamicIndex]:
    """Makes a datastore whose images share chunks; gives their indexes, by path."""
    writer = DatastoreWriter(path)
    base, more = made.image(1, "rrtr0rrrtr", tail=123), made.image(2, "rrrrrr")
    files = {"a.img.fidx": base, "b.img.fidx": more, "c.pxar.didx": made.image(3, "rrrr", tail=5)}
    places = [
        (SNAPSHOT, files),
        (NEWER, files | {"a.img.fidx": base[: 4 * CHUNK_SIZE] + more}),
        (made.snapshot(namespace=Namespace(("prod",))), {"a.img.fidx": more + base}),
    ]
    indexes: dict[str, FixedIndex | DynamicIndex] = {}
    for snapshot, content in places:
        directory = writer.add_snapshot(snapshot, content, chunk_size=CHUNK_SIZE)
        for name in content:
            parse = FixedIndex if name.endswith(".fidx") else DynamicIndex
            indexes[f"{snapshot}/{Archive(name).name}"] = parse((directory / name).read_bytes())
    return indexes


def data_of(found: FixedIndex | DynamicIndex) -> list[tuple[bytes, Range]]:
    """Digest and place of all chunks that are no holes."""
    spans = [found.span(number) for number in range(found.count)]
    ranges = [Range(start, end - start) for start, end in spans]
    return [(found.digest(n), ranges[n]) for n in range(found.count) if not found.is_hole(n)]


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_report_is_the_list_of_what_was_damaged(tmp_path: Path, kind: str, seed: int) -> None:
    indexes = fill(tmp_path / "datastore")
    chance = random.Random(seed)
    everything = sorted({digest for found in indexes.values() for digest, _where in data_of(found)})
    bad = chance.sample(everything, 10)
    writer = DatastoreWriter(tmp_path / "datastore")
    ways = [*damage.CHUNK_DAMAGE] * 2
    for digest, way in zip(bad, ways, strict=True):
        damage.CHUNK_DAMAGE[way](writer.chunk_path(digest), chance.randbytes(1000))
    expected = {
        path: merged([where for digest, where in data_of(found) if digest in bad])
        for path, found in indexes.items()
    }
    with SOURCES[kind](tmp_path / "datastore") as source:
        report = trio.run(verified, source)
    assert found_in(report) == {path: ranges for path, ranges in expected.items() if ranges}
    assert report.chunks == len(everything)
    for found in report.damaged:
        named = {digest for digest, _where in data_of(indexes[found.path])} & set(bad)
        assert all((digest.hex() in found.reason) == (digest in named) for digest in bad)


@pytest.mark.parametrize("kind", SOURCES)
def test_nothing_is_said_of_what_is_whole(tmp_path: Path, kind: str) -> None:
    indexes = fill(tmp_path / "datastore")
    with SOURCES[kind](tmp_path / "datastore") as source:
        report = trio.run(verified, source)
    assert (report.damaged, report.unverified) == ([], {})
    assert report.files == len(indexes) + 3


@pytest.mark.parametrize("kind", SOURCES)
def test_damaged_indexes_blobs_and_manifests_are_told_as_whole_files(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    writer = DatastoreWriter(tmp_path / "datastore")
    content = {"a.img.fidx": made.image(1, "rr"), "b.img.fidx": made.image(2, "r"), "c.conf.blob": b"c" * 99}
    for number in range(3):
        writer.add_snapshot(
            made.snapshot(time=made.TIME + number), content, chunk_size=CHUNK_SIZE, client_log=b"well\n" * 20
        )
    where = [tmp_path / "datastore" / str(made.snapshot(time=made.TIME + number)) for number in range(3)]
    damage.flip_bit(where[0] / "a.img.fidx", 8 * 4096 + 1)
    damage.flip_bit(where[0] / "c.conf.blob", 8 * 14)
    damage.flip_bit(where[0] / CLIENT_LOG.filename, 8 * 14)
    damage.flip_bit(where[1] / MANIFEST.filename, 8 * 30)
    (where[2] / "b.img.fidx").unlink()
    with SOURCES[kind](tmp_path / "datastore") as source:
        report = trio.run(verified, source)
    snapshots = [str(made.snapshot(time=made.TIME + number)) for number in range(3)]
    expected = {f"{snapshots[0]}/a.img", f"{snapshots[0]}/c.conf", f"{snapshots[0]}/client.log"}
    expected |= {snapshots[1], f"{snapshots[2]}/b.img"}
    assert found_in(report) == {path: [] for path in expected}
    assert "missing" in reason_of(report, f"{snapshots[2]}/b.img")
    assert report.unverified == {}
    caplog.clear()  # listing them is told of too


@in_trio
async def test_a_chunk_that_is_damaged_after_another_file_shared_it_is_told_for_both() -> None:
    source = MemorySource()
    shared = made.image(1, "rrr")
    source.add(SNAPSHOT, {"a.img.fidx": shared, "b.img.fidx": made.image(2, "r") + shared})
    source.damage(source.add_chunk(shared[CHUNK_SIZE : 2 * CHUNK_SIZE]), 900)
    assert found_in(await verified(source)) == {
        f"{SNAPSHOT}/a.img": [Range(CHUNK_SIZE, CHUNK_SIZE)],
        f"{SNAPSHOT}/b.img": [Range(2 * CHUNK_SIZE, CHUNK_SIZE)],
    }


@pytest.mark.parametrize("liar_first", [True, False])
@in_trio
async def test_an_index_that_lies_about_a_length_is_damaged_and_no_other(liar_first: bool) -> None:
    source = MemorySource()
    digest = source.add_chunk(made.image(1, "r")[:700])
    names = ["a.pxar.didx", "b.pxar.didx"]
    lengths = [400, 700] if liar_first else [700, 400]
    files = []
    for name, length in zip(names, lengths, strict=True):
        raw, csum = index.encode_dynamic([(length, digest)], ctime=0)
        source.files[SNAPSHOT, Archive(name)] = raw
        files.append(FileInfo(Archive(name), length, CryptMode.NONE, csum))
    source.infos[SNAPSHOT] = SnapshotInfo(SNAPSHOT, tuple(files))
    source.set_manifest(SNAPSHOT, files, None)
    liar = "a.pxar" if liar_first else "b.pxar"
    assert found_in(await verified(source)) == {f"{SNAPSHOT}/{liar}": [Range(0, 400)]}


def test_a_directory_that_is_named_twice_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = DatastoreWriter(tmp_path / "datastore")
    path = writer.add_snapshot(SNAPSHOT, {"a.conf.blob": b"a"})
    damage.truncate(path / MANIFEST.filename, 20)
    report = trio.run(verified, DirectorySource(tmp_path / "datastore"), "vm", "vm/100", "")
    assert list(found_in(report)) == [str(SNAPSHOT)]
    caplog.clear()


# --- keys


def sealed() -> MemorySource:
    source = MemorySource()
    files = {"a.img.fidx": made.image(1, "rr0"), "c.conf.blob": b"c" * 99}
    source.add(SNAPSHOT, files, crypt_mode=CryptMode.ENCRYPT, key=made.KEY, client_log=b"well\n")
    source.add(NEWER, files)
    return source


@in_trio
async def test_what_is_encrypted_with_a_key_that_is_not_at_hand_is_told_as_unverified() -> None:
    for keys in ({}, {made.OTHER_KEY.fingerprint: made.OTHER_KEY}):
        report = await verified(sealed(), keys=keys)
        assert report.damaged == []
        assert set(report.unverified) == {f"{SNAPSHOT}/{name}" for name in ("a.img", "c.conf", "client.log")}
        assert made.KEY.fingerprint in report.unverified[f"{SNAPSHOT}/a.img"]
        assert report.chunks == 2  # those of the other snapshot


@in_trio
async def test_with_its_key_what_is_encrypted_is_verified_as_all_else() -> None:
    source = sealed()
    report = await verified(source, keys=KEYS)
    assert (report.damaged, report.unverified, report.chunks) == ([], {}, 4)
    source.damage(source.add_chunk(made.image(1, "rr")[CHUNK_SIZE:], key=made.KEY), 1000)
    report = await verified(source, keys=KEYS)
    assert found_in(report) == {f"{SNAPSHOT}/a.img": [Range(CHUNK_SIZE, CHUNK_SIZE)]}


@in_trio
async def test_with_its_key_a_manifest_that_was_changed_damages_all_it_lists() -> None:
    source = sealed()
    source.set_manifest(SNAPSHOT, source.infos[SNAPSHOT].files, None)  # as if no key had been used
    report = await verified(source, f"{SNAPSHOT}", keys=KEYS)
    assert f"{SNAPSHOT}/a.img" in found_in(report)
    assert f"{SNAPSHOT}/c.conf" in found_in(report)
    assert report.chunks == 0


# --- a source that fails


@pytest.mark.parametrize("kind", ["fetch_chunk", "fetch_file", "snapshots"])
@in_trio
async def test_a_source_that_fails_is_raised_and_is_no_damage(kind: str) -> None:
    source = MemorySource()
    source.add(SNAPSHOT, {"a.img.fidx": made.image(1, "r" * 40)})
    source.fail(kind, *[SourceError("no answer")] * 9)  # looking at sizes has no error to tell
    with pytest.raises(SourceError, match="no answer"):
        await verified(source)
    assert source.calls["fetch_chunk"] <= WORKERS + 1
    assert source.closed == 1


def test_a_path_to_what_can_not_be_listed_is_raised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = DatastoreWriter(tmp_path / "datastore")
    path = writer.add_snapshot(SNAPSHOT, {"a.conf.blob": b"a"})
    damage.truncate(path / MANIFEST.filename, 20)
    with pytest.raises(DamageError, match="unreadable manifest"):
        trio.run(verified, DirectorySource(tmp_path / "datastore"), f"{SNAPSHOT}/a.conf")
    caplog.clear()


@in_trio
async def test_a_disk_that_cannot_be_parsed_changes_nothing_else_of_the_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = MemorySource()
    source.add(SNAPSHOT, {"drive-scsi0.img.fidx": made.image(1, "rrrr")})
    source.add(NEWER, {"drive-scsi0.img.fidx": made.image(2, "rr"), "x.conf.blob": b"x"})
    digest = source.add_chunk(made.image(1, "rrrr")[CHUNK_SIZE : 2 * CHUNK_SIZE])
    source.chunks[digest] = b"damaged"
    plain = await verified(source)
    monkeypatch.setattr("pbsfs.reader.disks.Parser", functools.partial(Parser, command=["/bin/false"]))
    report = await verified(source, shows_files=True)
    path = f"{SNAPSHOT}/drive-scsi0.img"
    assert found_in(report) == found_in(plain) == {path: [Range(CHUNK_SIZE, CHUNK_SIZE)]}
    assert (report.files, report.chunks, report.size) == (plain.files, plain.chunks, plain.size)
    (damage,) = report.damaged
    assert (damage.hit.paths, damage.hit.count) == ([], 0)
    ((where, why),) = damage.hit.incomplete.items()
    assert where == f"files/{SNAPSHOT}".encode()
    assert "the process that reads its file systems failed" in why


@pytest.mark.golden
def test_few_compressed_files_are_read_again_to_find_what_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(FILES / "datastore", tmp_path / "store")
    (stored,) = (tmp_path / "store/vm/322").glob("*/drive-virtio0.img.fidx")
    digest = FixedIndex(stored.read_bytes()).digest(26)
    (tmp_path / "store/.chunks" / digest.hex()[:4] / digest.hex()).unlink()
    read: list[bytes] = []
    plain = RemoteVolume.read

    def reading(volume: RemoteVolume, file: Entry, offset: int, size: int) -> bytes:
        read.append(file.name)
        return plain(volume, file, offset, size)

    monkeypatch.setattr(RemoteVolume, "read", reading)

    async def verify() -> Report:
        return await verified(DirectorySource(tmp_path / "store"), "vm/322", shows_files=True)

    (damage,) = trio.run(verify).damaged
    names = {path.rpartition(b"/")[2] for path in damage.hit.paths}
    assert names
    assert set(read) <= names

"""Directories that are datastores in part: caches of an object store, copies of a bucket, spoilt copies."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import trio

from pbsfs.base.errors import DamageError, SourceError
from pbsfs.base.names import MANIFEST, ROOT_NAMESPACE, Group, Namespace
from pbsfs.reader.damage import ZeroedRanges
from pbsfs.reader.reader import open_reader
from pbsfs.sources.base import GroupInfo
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.testing.writer import DatastoreWriter
from pbsfs.tree import BlobFile, ImageFile, Tree
from tests.sources.conformance import CONFIG, FIRST, IMAGE, LIMIT, VM, add, chunks_of
from tests.support import golden, made
from tests.support.made import TIME


def fetch(source: DirectorySource, digest: bytes) -> bytes:
    return trio.run(source.fetch_chunk, FIRST, IMAGE, digest, LIMIT)


def groups(source: DirectorySource) -> list[GroupInfo]:
    return trio.run(source.groups, ROOT_NAMESPACE)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings so far; takes them out."""
    found = [record.getMessage() for record in caplog.records if record.name.startswith("pbsfs")]
    caplog.clear()
    return found


# --- the cache of a datastore in an object store

NOT_HERE = (
    "is not here: the chunks of datastore directory .* are in an object store; read it through the server"
)


@pytest.fixture
def evicted(writer: DatastoreWriter) -> list[bytes]:
    """The digests of an image; of the last only, the chunk is in the cache."""
    add(writer)
    digests = sorted(chunks_of(writer, IMAGE))
    for digest in digests[:-1]:
        os.truncate(writer.chunk_path(digest), 0)
    assert len(digests) >= 4
    return digests


def test_a_chunk_that_the_server_took_out_of_its_cache_is_not_here(
    writer: DatastoreWriter, evicted: list[bytes]
) -> None:
    whole = writer.chunk_path(evicted[-1]).read_bytes()
    writer.chunk_path(evicted[0]).unlink()
    source = DirectorySource(writer.path)
    for digest in evicted[:-1]:
        with pytest.raises(SourceError, match=f"{digest.hex()} {NOT_HERE}") as caught:
            fetch(source, digest)
        assert not caught.value.retryable
    assert fetch(source, evicted[-1]) == whole


def test_one_marker_of_a_chunk_that_never_was_in_the_cache_tells(writer: DatastoreWriter) -> None:
    add(writer)
    digest, *others = sorted(chunks_of(writer, IMAGE))
    writer.chunk_path(digest).unlink()
    writer.chunk_path(others[0]).with_name(f"{others[0].hex()}.using").touch()
    with pytest.raises(SourceError, match=NOT_HERE):
        fetch(DirectorySource(writer.path), digest)


def test_it_is_told_once_at_the_start(
    writer: DatastoreWriter, evicted: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with open_reader(DirectorySource(writer.path)) as reader:
            for _turn in range(2):
                with pytest.raises(SourceError, match=NOT_HERE):
                    await reader.source.fetch_chunk(FIRST, IMAGE, evicted[0], LIMIT)

    trio.run(main)
    (line,) = told(caplog)
    assert "is the cache of a datastore in an object store" in line


def test_what_is_not_here_never_reads_as_zeros(
    writer: DatastoreWriter, evicted: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    zeroed = ZeroedRanges()

    async def main() -> None:
        async with open_reader(DirectorySource(writer.path), zeroed=zeroed) as reader:
            node = await Tree(reader).find(f"{FIRST}/{IMAGE.name}")
            assert isinstance(node, ImageFile)
            image = await node.open()
            handle = image.handle()
            with pytest.raises(SourceError, match=NOT_HERE):
                await handle.read(0, image.size)
            handle.close()

    trio.run(main)
    assert zeroed.count == 0
    told(caplog)


def test_an_empty_chunk_of_an_ordinary_datastore_is_damage(writer: DatastoreWriter) -> None:
    add(writer)
    digest = min(chunks_of(writer, IMAGE))
    os.truncate(writer.chunk_path(digest), 0)
    source = DirectorySource(writer.path)
    for _turn in range(2):
        with pytest.raises(DamageError, match=f"chunk file {writer.chunk_path(digest)}: it is empty"):
            fetch(source, digest)


def test_few_empty_chunks_among_many_are_damage(writer: DatastoreWriter) -> None:
    add(writer)
    for number in range(60):
        writer.add_chunk(b"%d" % number)
    digests = sorted(chunks_of(writer, IMAGE))[:4]
    for digest in digests:
        os.truncate(writer.chunk_path(digest), 0)
    source = DirectorySource(writer.path)
    for digest in digests:
        with pytest.raises(DamageError, match="it is empty"):
            fetch(source, digest)


def test_a_chunk_store_without_anything_in_it_is_a_disk_that_is_not_mounted(writer: DatastoreWriter) -> None:
    add(writer)
    digest = min(chunks_of(writer, IMAGE))
    source = DirectorySource(writer.path)
    chunks = writer.path / ".chunks"
    chunks.rename(writer.path / "away")
    chunks.mkdir()
    with pytest.raises(SourceError, match=r"\.chunks is empty; mount the disk with the chunks there") as e:
        fetch(source, digest)
    assert e.value.retryable
    chunks.rmdir()
    (writer.path / "away").rename(chunks)
    assert fetch(source, digest)


# --- a copy or mount of a bucket


@pytest.fixture
def bucket(writer: DatastoreWriter) -> Path:
    """A datastore as it lies in a bucket."""
    add(writer)
    add(writer, made.snapshot(namespace=Namespace(("prod",))))
    (writer.path / ".cnt").mkdir()
    for name in ("vm", "ct", "host", "ns"):
        (writer.path / name).rename(writer.path / ".cnt" / name)
    (writer.path / ".cnt" / "ns" / "prod" / ".namespace").touch()
    (writer.path / ".in-use").write_text("{}")
    return writer.path


def test_the_metadata_of_a_bucket_lies_apart(bucket: Path) -> None:
    source = DirectorySource(bucket)
    assert groups(source) == [GroupInfo(VM, TIME, 1, "root@pam")]
    assert trio.run(source.namespaces, ROOT_NAMESPACE) == [Namespace(("prod",))]
    assert [len(info.files) for info in trio.run(source.snapshots, VM)] == [4]
    stored = (bucket / ".cnt" / str(FIRST) / CONFIG.filename).read_bytes()
    assert trio.run(source.fetch_file, FIRST, CONFIG, LIMIT) == stored


def test_a_chunk_that_a_copied_bucket_lacks_is_damage(bucket: Path) -> None:
    writer = DatastoreWriter(bucket)
    digests = [writer.add_chunk(b"%d" % number) for number in range(6)]
    for digest in digests:
        os.truncate(writer.chunk_path(digest), 0)
        with pytest.raises(DamageError, match="it is empty"):
            fetch(DirectorySource(bucket), digest)


def test_a_bucket_whose_metadata_went_away_is_an_error_and_not_an_empty_one(bucket: Path) -> None:
    source = DirectorySource(bucket)
    (bucket / ".cnt").rename(bucket / "away")
    for _turn in range(2):
        with pytest.raises(SourceError, match=r"is not a datastore: its directory '\.cnt' is missing"):
            groups(source)
    (bucket / "away").rename(bucket / ".cnt")
    assert len(groups(source)) == 1


@pytest.mark.parametrize("part", [".cnt", ".chunks"])
def test_a_part_of_a_datastore_names_the_whole(bucket: Path, part: str) -> None:
    with pytest.raises(SourceError, match=rf"has no directory '\.chunks'; name {bucket}$"):
        DirectorySource(bucket / part)


def test_a_bucket_of_datastores_names_them(bucket: Path) -> None:
    with pytest.raises(SourceError, match=rf"; name a datastore in it: '{bucket.name}'$"):
        DirectorySource(bucket.parent)


@pytest.mark.golden
def test_the_golden_bucket_reads_as_what_was_backed_up() -> None:
    key = golden.plain_key()
    rows = (golden.ROOT / "bucket" / "checksums.tsv").read_text().splitlines()
    wanted = {path: (digest, int(size)) for digest, size, path, *_rest in (row.split("\t") for row in rows)}

    async def main() -> dict[str, tuple[str, int]]:
        found = {}
        source = DirectorySource(golden.ROOT / "bucket" / "gbucket")
        async with open_reader(source, keys={key.fingerprint: key}) as reader:
            tree = Tree(reader)
            assert await source.namespaces(Namespace(("prod",))) == [Namespace(("prod", "void"))]
            assert await source.groups(Namespace(("prod", "void"))) == []
            (first, second) = await source.snapshots(Group(ROOT_NAMESPACE, "host", "pad"))
            assert (first.protected, second.protected) == (True, False)
            assert first.notes
            blob = await tree.find("vm/500/latest/qemu-server.conf")
            assert isinstance(blob, BlobFile)
            assert await blob.read()
            for path in wanted:
                node = await tree.find(path)
                assert isinstance(node, ImageFile)
                image = await node.open()
                handle, checksum = image.handle(whole=True), hashlib.sha256()
                for offset in range(0, image.size, 4 << 20):
                    checksum.update(await handle.read(offset, min(4 << 20, image.size - offset)))
                handle.close()
                found[path] = (checksum.hexdigest(), image.size)
        return found

    assert trio.run(main) == wanted


# --- names that did not survive a copy


def mangle(path: Path, new: str) -> None:
    path.rename(path.with_name(new))


@pytest.mark.parametrize(
    "name",
    [
        "2023-11-15T22_13_20Z",
        "2023-11-15T22-13-20Z",
        "2023-11-15T22%3A13%3A20Z",
        "2023-1~1",
        "\N{FULLWIDTH COLON}",
    ],
)
def test_snapshots_whose_names_were_changed_are_told_once_and_hide_no_other(
    writer: DatastoreWriter, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    add(writer)
    mangle(add(writer, VM.snapshot(TIME + 86400)), name)
    source = DirectorySource(writer.path)
    for _turn in range(2):
        assert groups(source) == [GroupInfo(VM, TIME, 1, "root@pam")]
        assert [info.snapshot for info in trio.run(source.snapshots, VM)] == [FIRST]
    (line,) = told(caplog)
    start = f"{writer.path}/vm/100: left out directories that hold backups, but whose names are not times: "
    assert line.startswith(f"{start}{name!r}; ")
    assert "rename them (to the form 2023-11-14T22:13:20Z)" in line


def test_a_group_of_such_snapshots_only_is_damaged_and_not_empty(
    writer: DatastoreWriter, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(9):
        mangle(add(writer, VM.snapshot(TIME + number)), f"2023-11-14T22_13_2{number}Z")
    source = DirectorySource(writer.path)
    assert groups(source) == [GroupInfo(VM, None, 0, "root@pam")]
    with pytest.raises(
        DamageError, match=r"^vm/100: left out .*: '2023-11-14T22_13_20Z', .*, … \(9 in all\)"
    ):
        trio.run(source.snapshots, VM)
    assert len(told(caplog)) == 1


def test_short_names_of_files_tell_a_backup_too(
    writer: DatastoreWriter, caplog: pytest.LogCaptureFixture
) -> None:
    path = add(writer)
    shutil.rmtree(path)
    (path.parent / "2023-1~1").mkdir()
    (path.parent / "2023-1~1" / "INDEX~1.BLO").touch()
    with pytest.raises(DamageError, match="copying changed them"):
        trio.run(DirectorySource(writer.path).snapshots, VM)
    assert len(told(caplog)) == 1


def test_a_group_whose_name_was_changed_is_told_once(
    writer: DatastoreWriter, caplog: pytest.LogCaptureFixture
) -> None:
    mangle(add(writer).parent, "1 00")
    source = DirectorySource(writer.path)
    for _turn in range(2):
        assert groups(source) == []
    (line,) = told(caplog)
    assert line.startswith(f"{writer.path}/vm: left out directories that hold backups, ")
    assert "names are not backup ids: '1 00'; " in line


# --- links and other hostile things


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A datastore elsewhere, for links to lead to."""
    other = DatastoreWriter(tmp_path / "secret")
    add(other)
    (other.path / "vm" / "100" / "notes").write_text("secret")
    return other.path


@pytest.mark.parametrize("path", ["vm", "vm/100", str(FIRST), f"{FIRST}/{MANIFEST}"])
def test_a_link_in_the_datastore_is_told_and_not_followed(
    writer: DatastoreWriter, secret: Path, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    add(writer)
    (writer.path / path).rename(writer.path / "away")
    (writer.path / path).symlink_to(secret / path)
    source = DirectorySource(writer.path)
    refusal = f"{writer.path / path} is a symbolic link"
    with pytest.raises(SourceError, match=refusal):
        trio.run(source.fetch_file, FIRST, MANIFEST, LIMIT)
    if path == "vm":
        with pytest.raises(SourceError, match=refusal):
            groups(source)
        return
    assert [info.group for info in groups(source)] == ([] if path == "vm/100" else [VM])
    if path == "vm/100":
        with pytest.raises(SourceError, match=refusal):
            trio.run(source.snapshots, VM)
    else:
        found = trio.run(source.snapshots, VM)
        assert [info.files for info in found] == ([()] if path.endswith(str(MANIFEST)) else [])
    (line,) = told(caplog)
    assert str(writer.path / path) in line
    assert "symbolic link" in line


@pytest.mark.parametrize("name", ["notes", "owner"])
def test_notes_and_owners_that_are_links_are_not_shown(
    writer: DatastoreWriter, secret: Path, name: str
) -> None:
    group = add(writer).parent
    (group / name).unlink(missing_ok=True)
    (group / name).symlink_to(secret / "vm" / "100" / "notes")
    (info,) = groups(DirectorySource(writer.path))
    assert "secret" not in (info.notes, info.owner)


@pytest.mark.parametrize("level", ["file", "directory"])
def test_a_chunk_behind_a_link_is_an_error_and_no_damage(
    writer: DatastoreWriter, secret: Path, level: str
) -> None:
    add(writer)
    digest = min(chunks_of(writer, IMAGE))
    path = writer.chunk_path(digest) if level == "file" else writer.chunk_path(digest).parent
    path.rename(writer.path / "away")
    path.symlink_to(secret / path.relative_to(writer.path))
    with pytest.raises(SourceError, match=f"{path} is a symbolic link"):
        fetch(DirectorySource(writer.path), digest)


def test_the_chunk_store_itself_may_be_a_link(writer: DatastoreWriter) -> None:
    add(writer)
    (writer.path / ".chunks").rename(writer.path.parent / "elsewhere")
    (writer.path / ".chunks").symlink_to("../elsewhere")
    for digest, stored in chunks_of(writer, IMAGE).items():
        assert fetch(DirectorySource(writer.path), digest) == stored

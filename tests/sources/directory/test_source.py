"""The source that is a directory: what all sources promise, and what counts as part of a datastore."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from pbsfs.base.errors import DamageError, NotFoundError, SourceError
from pbsfs.base.names import CLIENT_LOG, ROOT_NAMESPACE, Namespace
from pbsfs.formats import blob
from pbsfs.sources.base import GroupInfo, Source
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.testing.writer import DatastoreWriter
from tests.sources.conformance import CONFIG, FIRST, IMAGE, LIMIT, VM, SourceConformance, add, chunks_of
from tests.sources.directory.asking import groups, instead, snapshots
from tests.support.made import TIME


class TestDirectorySource(SourceConformance):
    """What every source promises."""

    @asynccontextmanager
    async def open(self, datastore: Path) -> AsyncIterator[Source]:
        source = DirectorySource(datastore)
        try:
            yield source
        finally:
            await source.aclose()


# --- what is a datastore


def test_a_directory_that_is_not_there_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot read datastore .*/nowhere: No such file"):
        DirectorySource(tmp_path / "nowhere")


def test_a_directory_without_chunks_is_no_datastore(tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    with pytest.raises(
        SourceError,
        match=r"is not a datastore: it has no directory '\.chunks'; name the directory that has it$",
    ):
        DirectorySource(tmp_path)
    (tmp_path / ".chunks").touch()
    with pytest.raises(SourceError, match="is not a datastore"):
        DirectorySource(tmp_path)


def test_a_file_is_no_datastore(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="is not a directory; name the datastore's directory"):
        DirectorySource(tmp_path / "file")


def test_a_datastore_behind_a_link_is_one(writer: DatastoreWriter, tmp_path: Path) -> None:
    add(writer)
    (tmp_path / "link").symlink_to(writer.path)
    assert [info.snapshot for info in snapshots(DirectorySource(tmp_path / "link"))] == [FIRST]


def test_the_source_names_its_directory(writer: DatastoreWriter) -> None:
    assert str(DirectorySource(writer.path)) == f"datastore directory {writer.path}"


# --- foreign things


def test_what_is_no_part_of_a_datastore_is_ignored(writer: DatastoreWriter) -> None:
    path = add(writer)
    top, group = writer.path, path.parent
    namespace = top / "ns" / "prod"
    for folder in (top, top / "vm", group, path, namespace):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("file", "9", "2023-11-14T22:13:21Z", ".lock", "note\nbook"):
            (folder / name).write_text("not ours")
        for name in ("lost+found", ".zfs", "a b", "-x", "é"):
            (folder / name).mkdir()
        (folder / "nowhere").symlink_to("no/such/place")
    for name in ("2023-11-14", "2023-02-30T00:00:00Z", "latest", "0000-00-00T00:00:00Z", "backup"):
        (group / name).mkdir()
    (top / "qemu" / "100").mkdir(parents=True)
    (path / "drive.img.fidx.tmp").touch()
    (path / "extra.blob").touch()
    (top / "ns" / "just a file").touch()
    source = DirectorySource(top)

    assert [str(info.group) for info in groups(source)] == ["vm/100"]
    assert [(info.snapshot, len(info.files)) for info in snapshots(source)] == [(FIRST, 4)]
    assert trio.run(source.namespaces, ROOT_NAMESPACE) == [Namespace(("prod",))]
    assert trio.run(source.groups, Namespace(("prod",))) == []


def test_a_file_where_a_namespace_or_group_would_be_does_not_exist_as_one(writer: DatastoreWriter) -> None:
    (writer.path / "vm" / "100").touch()
    (writer.path / "ns").mkdir()
    (writer.path / "ns" / "prod").touch()
    source = DirectorySource(writer.path)
    calls: list[Callable[[Source], Awaitable[object]]] = [
        lambda s: s.snapshots(VM),
        lambda s: s.fetch_file(FIRST, IMAGE, LIMIT),
        lambda s: s.namespaces(Namespace(("prod",))),
        lambda s: s.groups(Namespace(("prod",))),
        lambda s: s.groups(Namespace(("prod", "db"))),
    ]
    for call in calls:
        with pytest.raises(NotFoundError):
            trio.run(call, source)


def test_a_datastore_that_lacks_a_type_s_directory_lists_the_others(writer: DatastoreWriter) -> None:
    add(writer)
    (writer.path / "ct").rmdir()
    (writer.path / "host").rmdir()
    (writer.path / "host").touch()
    assert [str(info.group) for info in groups(DirectorySource(writer.path))] == ["vm/100"]


def test_an_empty_group_is_listed_without_a_backup(writer: DatastoreWriter) -> None:
    writer.group_path(VM).mkdir()
    source = DirectorySource(writer.path)

    assert groups(source) == [GroupInfo(VM, None, 0, None)]
    assert snapshots(source) == []


# --- owners and notes


def test_owner_and_notes_of_a_group_are_its_files(writer: DatastoreWriter) -> None:
    group = add(writer).parent
    (group / "owner").write_text("  backup@pbs  \nsecond line\n")
    (group / "notes").write_text("the\nnotes")
    source = DirectorySource(writer.path)

    assert [(info.owner, info.notes) for info in groups(source)] == [("backup@pbs", "the\nnotes")]
    assert [info.owner for info in snapshots(source)] == ["backup@pbs"]


def test_an_owner_that_changes_is_seen(writer: DatastoreWriter) -> None:
    group = add(writer).parent
    source = DirectorySource(writer.path)
    assert snapshots(source)[0].owner == "root@pam"
    (group / "owner").write_text("other@pbs\n")

    assert snapshots(source)[0].owner == "other@pbs"


@pytest.mark.parametrize(
    "break_it",
    [
        pytest.param(lambda f: f.unlink(), id="missing"),
        pytest.param(lambda f: f.write_bytes(b""), id="empty"),
        pytest.param(lambda f: f.write_bytes(b"\n\n"), id="blank"),
        pytest.param(lambda f: os.truncate(f, (64 << 10) + 1), id="too large"),
        pytest.param(lambda f: instead(f).mkdir(), id="a directory"),
        pytest.param(lambda f: os.mkfifo(instead(f)), id="a FIFO"),
        pytest.param(lambda f: instead(f).symlink_to("owner"), id="a looping link"),
    ],
)
def test_without_a_readable_owner_everything_else_is_there(
    writer: DatastoreWriter, break_it: Callable[[Path], object]
) -> None:
    break_it(add(writer).parent / "owner")
    source = DirectorySource(writer.path)

    assert groups(source) == [GroupInfo(VM, TIME, 1, None)]
    assert [(info.owner, len(info.files)) for info in snapshots(source)] == [(None, 4)]


def test_an_owner_that_is_no_text_is_shown_as_far_as_it_is(writer: DatastoreWriter) -> None:
    (add(writer).parent / "owner").write_bytes(b"r\xff@pam\n")
    assert snapshots(DirectorySource(writer.path))[0].owner == "r�@pam"


def test_protection_is_a_file_in_the_snapshot(writer: DatastoreWriter) -> None:
    path = add(writer)
    source = DirectorySource(writer.path)
    assert not snapshots(source)[0].protected
    (path / ".protected").touch()
    assert snapshots(source)[0].protected
    (path / ".protected").unlink()
    assert not snapshots(source)[0].protected


def test_a_client_log_that_arrives_after_the_manifest_is_seen(writer: DatastoreWriter) -> None:
    path = add(writer)
    source = DirectorySource(writer.path)
    assert len(snapshots(source)[0].files) == 4
    (path / CLIENT_LOG.filename).write_bytes(blob.encode(b"log"))

    assert snapshots(source)[0].files[-1].archive == CLIENT_LOG


# --- odd files


@pytest.mark.parametrize(
    "replace",
    [
        pytest.param(lambda f: f.mkdir(), id="a directory"),
        pytest.param(os.mkfifo, id="a FIFO"),
        pytest.param(lambda f: os.mknod(f, stat.S_IFSOCK | 0o600), id="a socket"),
    ],
)
def test_what_is_no_regular_file_is_damage_and_never_hangs(
    writer: DatastoreWriter, replace: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    path = add(writer) / IMAGE.filename
    digest = next(iter(chunks_of(writer, IMAGE)))
    for file in (path, writer.chunk_path(digest)):
        file.unlink()
        replace(file)
    source = DirectorySource(writer.path)
    descriptors = len(os.listdir("/proc/self/fd"))

    with pytest.raises(DamageError, match="is not a regular file"):
        trio.run(source.fetch_file, FIRST, IMAGE, LIMIT)
    with pytest.raises(DamageError, match="is not a regular file"):
        trio.run(source.fetch_chunk, FIRST, IMAGE, digest, LIMIT)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    caplog.clear()


def test_an_oversize_file_is_refused_before_it_takes_memory(writer: DatastoreWriter) -> None:
    path = add(writer) / CONFIG.filename
    os.truncate(path, 1 << 40)
    with pytest.raises(DamageError, match=f"has {1 << 40} bytes where 1000 is the most"):
        trio.run(DirectorySource(writer.path).fetch_file, FIRST, CONFIG, 1000)


@pytest.mark.parametrize("names", [["0.bad"], ["1.bad", "0.bad"]])
def test_a_chunk_that_a_verification_renamed_is_told_from_a_missing_one(
    writer: DatastoreWriter, names: list[str]
) -> None:
    add(writer)
    digest = next(iter(chunks_of(writer, IMAGE)))
    path = writer.chunk_path(digest)
    for name in names:
        shutil.copy(path, path.with_name(f"{path.name}.{name}"))
    path.unlink()
    with pytest.raises(DamageError, match=rf"a verification found it damaged \({path.name}\.0\.bad\)"):
        trio.run(DirectorySource(writer.path).fetch_chunk, FIRST, IMAGE, digest, LIMIT)


def test_a_chunk_whose_directory_is_missing_or_a_file_is_missing(writer: DatastoreWriter) -> None:
    add(writer)
    digest = next(iter(chunks_of(writer, IMAGE)))
    folder = writer.chunk_path(digest).parent
    shutil.rmtree(folder)
    for _turn in range(2):
        with pytest.raises(DamageError, match="missing"):
            trio.run(DirectorySource(writer.path).fetch_chunk, FIRST, IMAGE, digest, LIMIT)
        folder.touch()

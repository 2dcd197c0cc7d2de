"""The source that is a directory: what all sources promise, and how it bears with what lies on disks."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from pbsfs.base.errors import DamageError, NotFoundError, SourceError
from pbsfs.base.names import CLIENT_LOG, MANIFEST, ROOT_NAMESPACE, Archive, Namespace
from pbsfs.formats import blob
from pbsfs.formats.manifest import MAX_MANIFEST_SIZE
from pbsfs.sources.base import GroupInfo, SnapshotInfo, Source
from pbsfs.sources.directory.limits import DEFAULT, DirectoryLimits
from pbsfs.sources.directory.root import Root
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.sources.layout import Steps
from pbsfs.testing.writer import DatastoreWriter
from tests.sources.conformance import (
    CONFIG,
    FIRST,
    IMAGE,
    LIMIT,
    VM,
    SourceConformance,
    add,
    chunks_of,
    stored,
)
from tests.support import damage, made
from tests.support.made import KEY, TIME


class TestDirectorySource(SourceConformance):
    """What every source promises."""

    @asynccontextmanager
    async def open(self, datastore: Path) -> AsyncIterator[Source]:
        source = DirectorySource(datastore)
        try:
            yield source
        finally:
            await source.aclose()


def snapshots(source: Source) -> list[SnapshotInfo]:
    return trio.run(source.snapshots, VM)


def groups(source: Source) -> list[GroupInfo]:
    return trio.run(source.groups, ROOT_NAMESPACE)


def questions(writer: DatastoreWriter) -> list[Callable[[Source], Awaitable[object]]]:
    """One call of each method; all of them succeed on a datastore that has the usual snapshot."""
    digest = next(iter(chunks_of(writer, IMAGE)))
    return [
        lambda s: s.namespaces(ROOT_NAMESPACE),
        lambda s: s.groups(ROOT_NAMESPACE),
        lambda s: s.snapshots(VM),
        lambda s: s.fetch_file(FIRST, CONFIG, LIMIT),
        lambda s: s.fetch_chunk(FIRST, IMAGE, digest, LIMIT),
    ]


def failures(source: Source, calls: list[Callable[[Source], Awaitable[object]]]) -> list[SourceError]:
    """The SourceError that each call has to fail with."""
    errors = []
    for call in calls:
        with pytest.raises(SourceError) as caught:
            trio.run(call, source)
        errors.append(caught.value)
    return errors


# --- what is a datastore


def test_a_directory_that_is_not_there_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot read datastore .*/nowhere: No such file"):
        DirectorySource(tmp_path / "nowhere")


def test_a_directory_without_chunks_is_no_datastore(tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    with pytest.raises(SourceError, match=r"is not a datastore: it has no directory '\.chunks'"):
        DirectorySource(tmp_path)
    (tmp_path / ".chunks").touch()
    with pytest.raises(SourceError, match="is not a datastore"):
        DirectorySource(tmp_path)


def test_a_file_is_no_datastore(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="is not a directory: name the datastore's directory"):
        DirectorySource(tmp_path / "file")


def test_a_datastore_behind_a_link_is_one(writer: DatastoreWriter, tmp_path: Path) -> None:
    add(writer)
    (tmp_path / "link").symlink_to(writer.path)
    assert [info.snapshot for info in snapshots(DirectorySource(tmp_path / "link"))] == [FIRST]


def test_the_source_names_its_directory(writer: DatastoreWriter) -> None:
    assert str(DirectorySource(writer.path)) == f"datastore directory {writer.path}"


# --- broken snapshots


def instead(path: Path) -> Path:
    """The path of a file that gives way to something else."""
    path.unlink()
    return path


BREAKAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda m: damage.truncate(m, 0),
    "cut short": lambda m: damage.truncate(m, 100),
    "a bit flipped": lambda m: damage.flip_bit(m, 8 * 60 + 3),
    "not a blob": lambda m: damage.replace(m, b"{}" * 50),
    "not JSON": lambda m: damage.replace(m, blob.encode(b"\0" * 9)),
    "not a manifest": lambda m: damage.replace(m, blob.encode(b'{"files": 1}')),
    "encrypted": lambda m: damage.replace(m, blob.encode(b"{}", key=KEY)),
    "too large": lambda m: os.truncate(m, blob.stored_limit(MAX_MANIFEST_SIZE) + 1),
    "a bomb": lambda m: damage.replace(m, blob.encode(b" " * (MAX_MANIFEST_SIZE + 1))),
    "a looping link": lambda m: instead(m).symlink_to(m.name),
    "a dangling link": lambda m: instead(m).symlink_to("nowhere"),
    "a directory": lambda m: instead(m).mkdir(),
    "a FIFO": lambda m: os.mkfifo(instead(m)),
}


@pytest.fixture
def neighbours(writer: DatastoreWriter) -> list[Path]:
    """The directories of three snapshots of one group; tests break the one in the middle."""
    return [add(writer, VM.snapshot(TIME + n)) for n in range(3)]


@pytest.mark.parametrize("break_it", [pytest.param(work, id=name) for name, work in BREAKAGES.items()])
def test_a_manifest_that_cannot_be_read_is_shown_as_such_and_told_once(
    neighbours: list[Path],
    writer: DatastoreWriter,
    caplog: pytest.LogCaptureFixture,
    break_it: Callable[[Path], object],
) -> None:
    break_it(neighbours[1] / MANIFEST.filename)
    source = DirectorySource(writer.path)
    for _turn in range(3):
        before, broken, after = snapshots(source)

        assert (len(before.files), len(after.files)) == (4, 4)
        assert (before.error, after.error) == (None, None)
        assert broken.files == ()
        assert broken.error
    assert_told_once(caplog, str(VM.snapshot(TIME + 1)))


def test_a_snapshot_without_a_manifest_is_left_out_and_told_once(
    neighbours: list[Path], writer: DatastoreWriter, caplog: pytest.LogCaptureFixture
) -> None:
    (neighbours[1] / MANIFEST.filename).unlink()
    source = DirectorySource(writer.path)
    for _turn in range(3):
        assert [info.snapshot.time for info in snapshots(source)] == [TIME, TIME + 2]
    assert_told_once(caplog, str(VM.snapshot(TIME + 1)))


def test_an_unfinished_backup_is_neither_counted_nor_the_last(
    neighbours: list[Path], writer: DatastoreWriter
) -> None:
    for unfinished in (neighbours[0], neighbours[2]):
        (unfinished / MANIFEST.filename).unlink()
    (neighbours[2] / IMAGE.filename).rename(neighbours[2] / "disk.img.tmp_fidx")
    assert groups(DirectorySource(writer.path)) == [GroupInfo(VM, TIME + 1, 1, "root@pam")]
    source = DirectorySource(writer.path, DirectoryLimits(looks=0))  # then the newest is right still
    assert groups(source) == [GroupInfo(VM, TIME + 1, 2, "root@pam")]


def test_a_group_whose_only_backup_is_unfinished_has_none(
    writer: DatastoreWriter,
) -> None:
    (add(writer) / MANIFEST.filename).unlink()
    assert groups(DirectorySource(writer.path)) == [GroupInfo(VM, None, 0, "root@pam")]


def test_what_is_in_the_trash_is_left_out(neighbours: list[Path], writer: DatastoreWriter) -> None:
    add(writer, made.snapshot("101"))
    (neighbours[2] / ".trashed").touch()
    (writer.path / "vm" / "101" / ".trashed").touch()
    (writer.path / "vm" / ".trash").mkdir()
    source = DirectorySource(writer.path)
    assert [info.snapshot.time for info in snapshots(source)] == [TIME, TIME + 1]
    assert groups(source) == [GroupInfo(VM, TIME + 1, 2, "root@pam")]


def assert_told_once(caplog: pytest.LogCaptureFixture, what: str) -> None:
    """One line in the log, which names `what`; and takes it out."""
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("pbsfs")]
    assert what in message
    assert message.isprintable()
    caplog.clear()


def test_concurrent_listings_tell_of_a_broken_snapshot_once(
    neighbours: list[Path], writer: DatastoreWriter, caplog: pytest.LogCaptureFixture
) -> None:
    damage.truncate(neighbours[1] / MANIFEST.filename, 20)
    source = DirectorySource(writer.path)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _turn in range(40):
                nursery.start_soon(source.snapshots, VM)

    trio.run(main)
    assert_told_once(caplog, str(VM.snapshot(TIME + 1)))


def test_a_snapshot_that_was_repaired_is_read_again(
    neighbours: list[Path], writer: DatastoreWriter, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = neighbours[1] / MANIFEST.filename
    whole = manifest.read_bytes()
    damage.flip_bit(manifest, 100)
    source = DirectorySource(writer.path)
    assert snapshots(source)[1].error
    damage.replace(manifest, whole)

    assert [info.error for info in snapshots(source)] == [None] * 3
    caplog.clear()


def test_a_file_that_the_manifest_names_but_is_missing_is_told_once(
    neighbours: list[Path], writer: DatastoreWriter, caplog: pytest.LogCaptureFixture
) -> None:
    (neighbours[1] / CONFIG.filename).unlink()
    source = DirectorySource(writer.path)
    for _turn in range(2):
        assert [len(info.files) for info in snapshots(source)] == [4, 4, 4]
    assert_told_once(caplog, f"{VM.snapshot(TIME + 1)}: {CONFIG} is in the manifest, but missing")


def test_a_file_of_an_unknown_kind_is_told_once_and_its_neighbours_are_listed(
    writer: DatastoreWriter, caplog: pytest.LogCaptureFixture
) -> None:
    path = add(writer) / MANIFEST.filename
    text = blob.decode(path.read_bytes(), max_size=1 << 20)
    path.write_bytes(blob.encode(text.replace(CONFIG.filename.encode(), b"x\\nstate.zst")))
    source = DirectorySource(writer.path)
    for _turn in range(2):
        assert {file.archive.filename for info in snapshots(source) for file in info.files} == {
            "disk.img.fidx",
            "root.pxar.didx",
            "index.json.blob",
        }
    assert_told_once(caplog, r"'x\nstate.zst'")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read, in order."""
    names: list[str] = []
    real = Root.read_file

    def read_file(root: Root, steps: Steps, limit: int) -> bytes:
        names.append(steps[-1])
        return real(root, steps, limit)

    monkeypatch.setattr(Root, "read_file", read_file)
    return names


@pytest.mark.parametrize(("limit", "parsed_again"), [(4, 6), (5, 6), (6, 0), (7, 0)])
def test_parsed_manifests_are_kept_up_to_a_limit_and_none_is_ever_mixed_up(
    writer: DatastoreWriter, read: list[str], limit: int, parsed_again: int
) -> None:
    for number in range(6):
        writer.add_snapshot(VM.snapshot(TIME + number), {}, notes=f"number {number}")
    source = DirectorySource(writer.path, DirectoryLimits(parsed_manifests=limit))
    for count in (6, parsed_again):
        read.clear()
        assert [info.notes for info in snapshots(source)] == [f"number {number}" for number in range(6)]
        assert read.count(MANIFEST.filename) == count


def test_an_unchanged_manifest_is_parsed_once(writer: DatastoreWriter, read: list[str]) -> None:
    add(writer)
    source = DirectorySource(writer.path)
    first = snapshots(source)
    read.clear()
    assert [info.files for info in snapshots(source)] == [info.files for info in first]
    assert read == ["owner"]


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


# --- a datastore that is gone, read-only, forbidden or stuck


def test_a_datastore_that_vanished_is_an_error_and_never_an_empty_one(writer: DatastoreWriter) -> None:
    add(writer)
    source = DirectorySource(writer.path)
    calls = questions(writer)
    writer.path.rename(writer.path.with_name("elsewhere"))
    for error in failures(source, calls):
        assert f"cannot read datastore {writer.path}: No such file" in str(error)
    writer.path.mkdir()  # the empty mount point of a disk that was unmounted
    for error in failures(source, calls):
        assert "is not a datastore" in str(error)
    writer.path.rmdir()
    writer.path.with_name("elsewhere").rename(writer.path)
    for call in calls:
        trio.run(call, source)


def test_reading_leaves_no_trace(writer: DatastoreWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    add(writer)
    calls = questions(writer)
    real = os.open

    def open_for_reading(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        assert flags & os.O_ACCMODE == os.O_RDONLY
        assert not flags & (os.O_CREAT | os.O_TRUNC)
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", open_for_reading)
    before = dict(states(writer.path))
    for call in calls:
        trio.run(call, DirectorySource(writer.path))
    assert dict(states(writer.path)) == before


def states(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """All that reading must not change, of all files and directories."""
    for file in [path, *path.rglob("*")]:
        state = file.lstat()
        yield str(file), (state.st_mode, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_nlink)


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Makes opening anything whose path ends so, or is below it, fail with an errno, for root too."""

    def set_fault(end: str, number: int) -> None:
        real = os.open

        def failing(path: Any, flags: int, *rest: Any, dir_fd: int | None = None) -> int:
            above = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            if os.path.join(above, path).endswith(end):
                raise OSError(number, os.strerror(number))
            return real(path, flags, *rest, dir_fd=dir_fd)

        monkeypatch.setattr(os, "open", failing)

    return set_fault


def test_a_snapshot_that_may_not_be_read_hides_no_other(
    neighbours: list[Path],
    writer: DatastoreWriter,
    fault: Callable[[str, int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    fault(neighbours[1].name, errno.EACCES)
    source = DirectorySource(writer.path)
    for _turn in range(2):
        before, broken, after = snapshots(source)
        assert (len(before.files), len(broken.files), len(after.files)) == (4, 0, 4)
        assert broken.error == f"cannot read {neighbours[1]}: Permission denied"
    assert_told_once(caplog, str(VM.snapshot(TIME + 1)))


def test_a_snapshot_that_may_not_be_read_counts_in_its_group(
    neighbours: list[Path], writer: DatastoreWriter, fault: Callable[[str, int], None]
) -> None:
    fault(neighbours[2].name, errno.EACCES)
    assert groups(DirectorySource(writer.path)) == [GroupInfo(VM, TIME + 2, 3, "root@pam")]


def test_a_manifest_that_may_not_be_read_hides_no_other(
    neighbours: list[Path],
    writer: DatastoreWriter,
    fault: Callable[[str, int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    fault(f"{neighbours[1].name}/{MANIFEST}", errno.EIO)
    source = DirectorySource(writer.path)
    assert [len(info.files) for info in snapshots(source)] == [4, 0, 4]
    assert_told_once(caplog, "Input/output error")


def test_a_group_that_may_not_be_read_hides_no_other(
    writer: DatastoreWriter, fault: Callable[[str, int], None], caplog: pytest.LogCaptureFixture
) -> None:
    add(writer)
    add(writer, made.snapshot("101"))
    fault("/vm/100", errno.EACCES)
    source = DirectorySource(writer.path)

    assert [(info.group.id, info.last_backup) for info in groups(source)] == [("100", None), ("101", TIME)]
    assert_told_once(caplog, "vm/100: cannot read")
    (error,) = failures(source, [lambda s: s.snapshots(VM)])
    assert "Permission denied" in str(error)


@pytest.mark.parametrize("folder", ["vm", "ns"])
def test_a_level_that_may_not_be_listed_is_an_error_and_not_an_empty_one(
    writer: DatastoreWriter, fault: Callable[[str, int], None], folder: str
) -> None:
    add(writer)
    add(writer, made.snapshot(namespace=Namespace(("prod",))))
    source = DirectorySource(writer.path)
    fault(f"{writer.path.name}/{folder}", errno.EACCES)
    call: Callable[[Source], Awaitable[object]]
    call = (
        (lambda s: s.groups(ROOT_NAMESPACE)) if folder == "vm" else (lambda s: s.namespaces(ROOT_NAMESPACE))
    )
    (error,) = failures(source, [call])
    assert str(error) == f"cannot read {writer.path / folder}: Permission denied"


@pytest.mark.parametrize(
    ("number", "retryable"),
    [(errno.EACCES, False), (errno.EPERM, False), (errno.ENXIO, True), (errno.ESTALE, True)],
)
def test_a_file_or_chunk_that_cannot_be_read_is_named_and_a_retry_may_help_or_not(
    writer: DatastoreWriter, fault: Callable[[str, int], None], number: int, retryable: bool
) -> None:
    add(writer)
    digest = next(iter(chunks_of(writer, IMAGE)))
    fault(CONFIG.filename, number)
    fault(digest.hex(), number)
    calls = questions(writer)[3:]
    errors = failures(DirectorySource(writer.path), calls)

    paths = [writer.snapshot_path(FIRST) / CONFIG.filename, writer.chunk_path(digest)]
    assert [str(error) for error in errors] == [f"cannot read {p}: {os.strerror(number)}" for p in paths]
    assert [error.retryable for error in errors] == [retryable] * 2


@pytest.mark.parametrize("number", [errno.EIO, errno.EBADMSG, errno.EUCLEAN])
def test_a_chunk_that_the_disk_cannot_read_any_more_is_damage(
    writer: DatastoreWriter, fault: Callable[[str, int], None], number: int
) -> None:
    add(writer)
    digest = next(iter(chunks_of(writer, IMAGE)))
    fault(digest.hex(), number)
    source = DirectorySource(writer.path)
    with pytest.raises(DamageError, match=f"{digest.hex()}: {os.strerror(number)}"):
        trio.run(source.fetch_chunk, FIRST, IMAGE, digest, LIMIT)
    writer.path.rename(writer.path.with_name("away"))  # where all of it is gone, that is what is told
    with pytest.raises(SourceError, match="cannot read datastore"):
        trio.run(source.fetch_chunk, FIRST, IMAGE, digest, LIMIT)


class Stuck:
    """A file system that does not answer until it is released: files called `name`, or all.

    `clock`, where it is set, runs only while a thread is stuck.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._answers = threading.Event()
        self.name: str | None = None
        self.clock: MockClock | None = None

        real = Root.read_file

        def read_file(root: Root, steps: Steps, limit: int) -> bytes:
            if self.name in (None, steps[-1]) and not self._answers.is_set():
                if self.clock is not None:
                    trio.from_thread.run_sync(setattr, self.clock, "autojump_threshold", 0)
                self._answers.wait()
            return real(root, steps, limit)

        monkeypatch.setattr(Root, "read_file", read_file)

    def release(self) -> None:
        self._answers.set()


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    storage = Stuck(monkeypatch)
    yield storage
    storage.release()


def test_a_stuck_file_system_is_an_error_after_the_timeout(writer: DatastoreWriter, stuck: Stuck) -> None:
    add(writer)
    source = DirectorySource(writer.path)

    async def main() -> float:
        start = trio.current_time()
        with pytest.raises(
            SourceError, match=f"no answer from datastore directory .* within {DEFAULT.io_timeout:.0f} s"
        ) as e:
            await source.fetch_file(FIRST, CONFIG, LIMIT)
        assert e.value.retryable
        return trio.current_time() - start

    assert trio.run(main, clock=MockClock(autojump_threshold=0)) == pytest.approx(DEFAULT.io_timeout)
    stuck.release()


def test_more_stuck_calls_than_threads_all_get_their_error_and_later_ones_their_answer(
    writer: DatastoreWriter, stuck: Stuck
) -> None:
    add(writer)
    source = DirectorySource(writer.path, DirectoryLimits(io_timeout=0.05))
    errors: list[SourceError] = []
    calls = DEFAULT.threads + 20

    async def call() -> None:
        try:
            await source.fetch_file(FIRST, CONFIG, LIMIT)
        except SourceError as error:
            errors.append(error)

    async def main() -> bytes:
        async with trio.open_nursery() as nursery:
            for _turn in range(calls):
                nursery.start_soon(call)
        # Decoding runs in trio's own threads, which stuck storage must not use up.
        with trio.fail_after(10):
            assert await trio.to_thread.run_sync(lambda: "decoded") == "decoded"
        stuck.release()
        with trio.fail_after(10):
            while source.workers.stuck():
                await trio.lowlevel.checkpoint()
            while True:
                try:
                    return await source.fetch_file(FIRST, CONFIG, LIMIT)
                except SourceError:  # the short limit
                    continue

    assert trio.run(main) == stored(writer, CONFIG)
    assert len(errors) == calls


def test_while_an_operation_is_stuck_others_fail_fast(writer: DatastoreWriter, stuck: Stuck) -> None:
    add(writer)
    source = DirectorySource(writer.path)

    clock = stuck.clock = MockClock()

    async def waited() -> float:
        start = trio.current_time()
        with pytest.raises(SourceError, match="no answer from datastore directory") as caught:
            await source.fetch_file(FIRST, CONFIG, LIMIT)
        assert caught.value.retryable
        clock.autojump_threshold = float("inf")
        return trio.current_time() - start

    async def main() -> list[float]:
        found = [await waited() for _ in range(3)]
        clock.jump(DEFAULT.stuck_pause)
        return found + [await waited() for _ in range(3)]

    assert trio.run(main, clock=clock) == pytest.approx(
        [DEFAULT.io_timeout, 0, 0, DEFAULT.stuck_timeout, 0, 0]
    )


def test_what_can_be_read_beside_a_stuck_operation_is_read(writer: DatastoreWriter, stuck: Stuck) -> None:
    add(writer)
    source = DirectorySource(writer.path)
    clock, stuck.name = MockClock(), IMAGE.filename
    stuck.clock = clock

    async def main() -> list[bytes]:
        with pytest.raises(SourceError, match="within 60 s"):
            await source.fetch_file(FIRST, IMAGE, LIMIT)
        clock.autojump_threshold = float("inf")
        clock.jump(DEFAULT.stuck_pause)
        return [await source.fetch_file(FIRST, CONFIG, LIMIT) for _ in range(3)]

    assert trio.run(main, clock=clock) == [stored(writer, CONFIG)] * 3


def test_a_missing_file_is_not_reported_as_a_vanished_datastore(writer: DatastoreWriter) -> None:
    add(writer)
    source = DirectorySource(writer.path)
    with pytest.raises(NotFoundError, match=r"nothing\.blob does not exist"):
        trio.run(source.fetch_file, FIRST, Archive("nothing.blob"), LIMIT)
    assert [info.snapshot for info in snapshots(source)] == [FIRST]

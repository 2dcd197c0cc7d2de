"""A directory that is gone, read-only or forbidden."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from pbsfs.base.errors import DamageError, NotFoundError, SourceError
from pbsfs.base.names import MANIFEST, ROOT_NAMESPACE, Archive, Namespace
from pbsfs.sources.base import GroupInfo, Source
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.testing.writer import DatastoreWriter
from tests.sources.conformance import CONFIG, FIRST, IMAGE, LIMIT, VM, add, chunks_of
from tests.sources.directory.asking import assert_told_once, failures, groups, questions, snapshots
from tests.support import made
from tests.support.made import TIME


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


def test_a_missing_file_is_not_reported_as_a_vanished_datastore(writer: DatastoreWriter) -> None:
    add(writer)
    source = DirectorySource(writer.path)
    with pytest.raises(NotFoundError, match=r"nothing\.blob does not exist"):
        trio.run(source.fetch_file, FIRST, Archive("nothing.blob"), LIMIT)
    assert [info.snapshot for info in snapshots(source)] == [FIRST]

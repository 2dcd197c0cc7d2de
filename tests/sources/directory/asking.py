"""Questions to a source that is a directory, and what tests expect of the log."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from pbsfs.base.errors import SourceError
from pbsfs.base.names import ROOT_NAMESPACE
from pbsfs.sources.base import GroupInfo, SnapshotInfo, Source
from pbsfs.testing.writer import DatastoreWriter
from tests.sources.conformance import CONFIG, FIRST, IMAGE, LIMIT, VM, chunks_of


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


def instead(path: Path) -> Path:
    """The path of a file that gives way to something else."""
    path.unlink()
    return path


def assert_told_once(caplog: pytest.LogCaptureFixture, what: str) -> None:
    """One line in the log, which names `what`; and takes it out."""
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("pbsfs")]
    assert what in message
    assert message.isprintable()
    caplog.clear()

"""A group of three snapshots."""

from __future__ import annotations

from pathlib import Path

import pytest

from pbsfs.testing.writer import DatastoreWriter
from tests.sources.conformance import VM, add
from tests.support.made import TIME


@pytest.fixture
def neighbours(writer: DatastoreWriter) -> list[Path]:
    """The directories of three snapshots of one group; tests break the one in the middle."""
    return [add(writer, VM.snapshot(TIME + n)) for n in range(3)]

"""Datastores that the tests of the plugin share; no test changes them."""

from __future__ import annotations

import pytest

from pbsfs.testing.writer import DatastoreWriter
from tests.nbd import disks
from tests.nbd.disks import Disk
from tests.support import made
from tests.support.stocked import Stocked, stock


@pytest.fixture(scope="session")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Stocked:
    return stock(tmp_path_factory.mktemp("stocked") / "datastore")


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    """A disk of some 100 MiB, of chunks as large as real ones, with holes and an odd end."""
    path = tmp_path_factory.mktemp("large") / "datastore"
    content = made.image(31, "rr0rrt00rrrr0rtrrrr0rrrr", chunk_size=disks.LARGE_CHUNK, tail=12_345)
    DatastoreWriter(path).add_snapshot(made.snapshot(), {"drive-scsi0.img.fidx": content}, compress=False)
    return Disk(path, content)


@pytest.fixture(scope="session")
def striped(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    """A disk with many more extents than fit into one answer: chunks and holes by turns."""
    path = tmp_path_factory.mktemp("striped") / "datastore"
    content = made.image(32, "r0") * disks.STRIPES + b"end"
    DatastoreWriter(path).add_snapshot(
        made.snapshot(), {"drive-scsi0.img.fidx": content}, chunk_size=disks.CHUNK
    )
    return Disk(path, content)

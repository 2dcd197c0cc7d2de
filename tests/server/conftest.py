"""Servers over golden and over made data."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pbsfs.base.names import Group, Namespace
from pbsfs.testing.writer import DatastoreWriter
from tests.support import golden, made
from tests.support.server import READER, ReferenceServer
from tests.support.server.releases import PBS_4

PASSWORD = "p:a s+s/w%rd"
SECRET = "5ec2e7/%+:secret"
OWNED = Group(Namespace(("prod",)), "host", "owned")


@pytest.fixture(scope="module")
def datastore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made data. Not to be written to: all tests of a module share it."""
    writer = DatastoreWriter(tmp_path_factory.mktemp("made") / "datastore")
    writer.add_snapshot(
        made.snapshot(),
        {"drive-scsi0.img.fidx": made.image(1, "rr0trr", tail=99), "qemu-server.conf.blob": b"name: made\n"},
        chunk_size=1 << 16,
        notes="first line\nsecond",
        verify_state="ok",
        protected=True,
        client_log=b"a log\n",
    )
    writer.add_snapshot(
        made.snapshot(time=made.TIME + made.DAY),
        {"big.img.fidx": made.image(2, "rrr", chunk_size=4 << 20)},
        compress=False,
    )
    writer.add_snapshot(made.snapshot("200", type="ct"), {"root.pxar.didx": made.image(3, "rtr")})
    writer.add_snapshot(
        OWNED.snapshot(made.TIME),
        {"a.img.fidx": made.image(4, "r")},
        chunk_size=1 << 16,
        owner="reader@pbs!viewer",
    )
    (writer.path / "vm/100/notes").write_text("the group's\nnotes")
    return writer.path


@pytest.fixture
def server(datastore: Path) -> Iterator[ReferenceServer]:
    """A server over made data, with a user and a token who may read all of it."""
    with ReferenceServer(datastore, store="made") as server:
        server.add_user("reader@pbs", PASSWORD)
        server.add_token("reader@pbs!viewer", SECRET)
        yield server


@pytest.fixture(scope="module")
def golden_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReferenceServer]:
    """A server as the one that was recorded."""
    path = tmp_path_factory.mktemp("golden") / "datastore"
    shutil.copytree(golden.DATASTORE, path, ignore=shutil.ignore_patterns(".chunks"))
    path.chmod(0o755)
    (path / "ns").chmod(0o755)
    (path / ".chunks").symlink_to(golden.DATASTORE / ".chunks")
    (path / "ns" / "empty").mkdir()
    with ReferenceServer(path, shown_path="/datastore") as server:
        _admit(server)
        yield server


@pytest.fixture(scope="module")
def golden_servers(
    golden_server: ReferenceServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, ReferenceServer]]:
    """Servers as those that were recorded, by the directory of the recordings."""
    path = tmp_path_factory.mktemp("golden-4") / "datastore"
    shutil.copytree(golden.DATASTORE, path, ignore=shutil.ignore_patterns(".chunks"))
    for place in (path, path / "ns", path / "vm"):
        place.chmod(0o755)
    (path / ".chunks").symlink_to(golden.DATASTORE / ".chunks")
    (path / "ns" / "empty").mkdir()
    (path / "vm" / "199").mkdir()
    (path / "vm" / "199" / "owner").write_text("tester@pbs\n")
    with ReferenceServer(path, release=PBS_4, shown_path="/mnt/datastore/golden") as server:
        _admit(server)
        yield {"api": golden_server, "api-4.2.3": server}


def _admit(server: ReferenceServer) -> None:
    server.add_user("reader@pbs", PASSWORD)
    server.add_token("reader@pbs!viewer", SECRET)
    server.add_token("reader@pbs!limited", SECRET, grants={"/datastore/golden/prod": READER})

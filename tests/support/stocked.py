"""A datastore that holds some of everything, and what its files have to read as."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pbsfs.base.names import Namespace
from pbsfs.formats.manifest import CryptMode
from pbsfs.testing.writer import DatastoreWriter
from tests.support import made

CHUNK = 1 << 16

FIRST = "vm/100/2023-11-14T22:13:20Z"
SECOND = "vm/100/2023-11-15T22:13:20Z"
IMAGE = f"{FIRST}/drive-scsi0.img"
NEWER_IMAGE = f"{SECOND}/drive-scsi0.img"
CONFIGURATION = f"{FIRST}/qemu-server.conf"
LOG = f"{FIRST}/client.log"
ARCHIVE = "ct/200/2023-11-14T22:13:20Z/root.pxar"
ENCRYPTED = "vm/101/2023-11-14T22:13:20Z/drive-scsi0.img"
IN_NAMESPACE = "ns/prod/vm/100/2023-11-14T22:13:20Z/drive-scsi0.img"

LAYOUT = "rr00tr0r"
"""The chunks of `IMAGE`, as `made.image` has them."""

SEALED = made.image(4, "r0", tail=5)
"""What `ENCRYPTED` holds."""


@dataclass
class Stocked:
    """The datastore. `contents`: of each readable file, by its path in a mount."""

    path: Path
    writer: DatastoreWriter
    contents: dict[str, bytes] = field(default_factory=dict)


def stock(path: Path) -> Stocked:
    """Makes the datastore in the directory `path`."""
    writer = DatastoreWriter(path)
    first = made.image(1, LAYOUT, tail=1536)
    second = made.image(2, "0r", tail=1)
    configuration = b"name: made\nmemory: 512\n" * 40
    pxar = made.image(3, "rtr", tail=99)
    log = b"starting backup\n"
    writer.add_snapshot(
        made.snapshot(),
        {"drive-scsi0.img.fidx": first, "qemu-server.conf.blob": configuration},
        chunk_size=CHUNK,
        owner="tester@pbs",
        notes="before the upgrade\nkeep",
        verify_state="ok",
        protected=True,
        client_log=log,
    )
    writer.add_snapshot(
        made.snapshot(time=made.TIME + made.DAY), {"drive-scsi0.img.fidx": second}, chunk_size=CHUNK
    )
    writer.add_snapshot(
        made.snapshot("101"),
        {"drive-scsi0.img.fidx": SEALED},
        crypt_mode=CryptMode.ENCRYPT,
        key=made.KEY,
        chunk_size=CHUNK,
    )
    writer.add_snapshot(made.snapshot("200", type="ct"), {"root.pxar.didx": pxar})
    writer.add_snapshot(
        made.snapshot(namespace=Namespace(("prod",))), {"drive-scsi0.img.fidx": first}, chunk_size=CHUNK
    )
    contents = {
        IMAGE: first,
        NEWER_IMAGE: second,
        CONFIGURATION: configuration,
        LOG: log,
        ARCHIVE: pxar,
        IN_NAMESPACE: first,
    }
    return Stocked(path, writer, contents)

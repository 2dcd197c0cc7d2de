"""Images of many terabytes that take little room: one chunk, and one index for all of them."""

from __future__ import annotations

import os

from pbsfs.base.names import MANIFEST, Archive
from pbsfs.formats import blob, index, manifest
from pbsfs.formats.manifest import CryptMode, ManifestFile
from pbsfs.testing.writer import DatastoreWriter
from tests.support import made

_ARCHIVE = Archive("drive-scsi0.img.fidx")


def large_images(writer: DatastoreWriter, data: bytes, *, size: int, count: int) -> list[str]:
    """Adds `count` snapshots with an image of `size` bytes each, which is `data` (a chunk) again and again.

    Returns the images' paths in a mount.
    """
    digest = writer.add_chunk(data)
    stored, csum = index.encode_fixed(
        [digest * (size // len(data))], size=size, chunk_size=len(data), ctime=made.TIME
    )
    places: list[str] = []
    for number in range(count):
        snapshot = made.snapshot(time=made.TIME + number * made.DAY)
        directory = writer.snapshot_path(snapshot)
        directory.mkdir(parents=True)
        if number:
            os.link(writer.path / f"{places[0]}.fidx", directory / _ARCHIVE.filename)
        else:
            (directory / _ARCHIVE.filename).write_bytes(stored)
            (directory.parent / "owner").write_text("root@pam\n")
        text = manifest.encode(
            backup_type=snapshot.group.type,
            backup_id=snapshot.group.id,
            backup_time=snapshot.time,
            files=(ManifestFile(_ARCHIVE, CryptMode.NONE, size, csum),),
            unprotected={},
            key=None,
        )
        (directory / MANIFEST.filename).write_bytes(blob.encode(text))
        places.append(f"{snapshot}/{_ARCHIVE.name}")
    return places

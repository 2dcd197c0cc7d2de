"""The disks of a snapshot, opened: the volumes on them, which a parser process reads.

Used from tasks of one trio loop.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

from pbsfs.base.errors import DamageError, KeyRequiredError
from pbsfs.disks.host import Parser, VolumeInfo
from pbsfs.disks.remote import RemoteVolume
from pbsfs.reader.bridge import Bridge, ImageStream
from pbsfs.reader.contents import OpenContents
from pbsfs.reader.image import Image
from pbsfs.reader.reader import Reader
from pbsfs.sources.base import FileInfo, SnapshotInfo

log = logging.getLogger(__name__)

_NO_DISKS = ("drive-efidisk", "drive-tpmstate")  # variables of a firmware, the state of a TPM


class OpenDisks:
    """The disks of a snapshot that can be opened. `volumes`: what is on them, in order. `failed`: the errors
    of the others, by their short names."""

    def __init__(
        self,
        parser: Parser,
        images: Sequence[Image],
        bridge: Bridge,
        volumes: Sequence[VolumeInfo],
        failed: dict[str, DamageError | KeyRequiredError],
    ) -> None:
        self.volumes = volumes
        self.failed = failed
        self._parser = parser
        self._images = images
        self._bridge = bridge

    async def open(self, volume: VolumeInfo) -> OpenContents:
        """The file system on a volume. Raises DamageError, KeyRequiredError, SourceError."""
        contents = await self._bridge.run(functools.partial(RemoteVolume, self._parser, volume))
        return OpenContents(contents, self._images, self._bridge)


def disks_of(files: Sequence[FileInfo]) -> dict[str, FileInfo]:
    """The disk images among the images of a snapshot, by their short names: `scsi0` of `drive-scsi0.img`."""
    found: dict[str, FileInfo] = {}
    for file in files:
        name = file.archive.name
        if not name.startswith(_NO_DISKS):
            short = name.removeprefix("drive-").removesuffix(".img") or name
            found[name if short in found else short] = file
    return found


async def open_disks(
    reader: Reader, info: SnapshotInfo, files: dict[str, FileInfo], max_age: float
) -> OpenDisks:
    """The disks `files`, by their short names, and what is on them. Raises SourceError, and MemoryLimitError.

    Damage that hides what is on the disks is in `OpenDisks.failed`, for all of them.
    """
    images: list[Image] = []
    names: list[str] = []
    failed: dict[str, DamageError | KeyRequiredError] = {}
    for name, file in files.items():
        try:
            images.append(await reader.open_image(info, file, max_age))
            names.append(name)
        except (DamageError, KeyRequiredError) as error:
            failed[name] = error
    parser = Parser(str(info.snapshot), list(zip(names, map(ImageStream, images), strict=True)))
    volumes: Sequence[VolumeInfo] = []
    if images:
        try:
            volumes = await reader.bridge.run(parser.volumes)
        except (DamageError, KeyRequiredError) as error:
            failed |= dict.fromkeys(names, error)
    return OpenDisks(parser, images, reader.bridge, volumes, failed)

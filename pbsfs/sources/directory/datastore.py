"""The datastore in a directory: where its parts are, and whether it is still there.

The directory may also be a copy or mount of what a server keeps in an object store: then everything but the
chunks is in a directory of its own. The directory source and its parts use this module from their worker
threads; everything blocks, and nothing changes after construction.
"""

from __future__ import annotations

import errno
import os
import stat
from itertools import islice
from pathlib import Path

from pbsfs.base.errors import SourceError
from pbsfs.base.text import first_of, quoted
from pbsfs.sources import layout
from pbsfs.sources.base import Usage
from pbsfs.sources.directory.limits import DirectoryLimits
from pbsfs.sources.directory.root import Root
from pbsfs.sources.listing.store import Store

_MOST_LOOKED_AT = 1000
"""Entries of a directory that is not a datastore in which `Datastore` looks for one."""


_ACTIONS = {
    errno.ENOENT: "; check the name, and that the disk with the datastore is mounted",
    errno.EACCES: "; run pbsfs as a user who may read it, as root or backup",
    errno.EPERM: "; run pbsfs as a user who may read it, as root or backup",
    errno.EIO: "; look for the reason in the kernel's log",
    errno.ENOTCONN: "; unmount that file system, and mount it again",
    errno.ESTALE: "; unmount that file system, and mount it again",
}
"""What to do where the directory can't be read."""


class Datastore(Store):
    """The datastore in the directory `path`: its `chunks`, and its `metadata`, which is everything else.

    `is_bucket`: whether this is a copy or mount of a bucket in an object store.
    """

    def __init__(self, path: Path, limits: DirectoryLimits) -> None:
        """Raises SourceError if `path` is not a datastore."""
        self.path = path
        self.chunks = Root(str(path / layout.CHUNKS))
        self.metadata: Root = Root(str(path))
        super().__init__(limits)
        self.check()
        apart = path / layout.METADATA
        self.is_bucket = apart.is_dir()
        if self.is_bucket:
            self.metadata = Root(str(apart))

    def __str__(self) -> str:
        return f"datastore directory {self.path}"

    def check(self) -> None:
        """Raises SourceError if the directory is not a datastore: not any more, if its disk was unmounted."""
        try:
            has_chunks = _is_datastore(self.path)
            if has_chunks and os.path.isdir(self.metadata.path):
                return
            kind = os.stat(self.path)
        except OSError as error:
            raise SourceError(
                f"cannot read datastore {self.path}: {error.strerror}{_ACTIONS.get(error.errno or 0, '')}"
            ) from None
        if not stat.S_ISDIR(kind.st_mode):
            raise SourceError(f"{self.path} is not a directory; name the datastore's directory")
        if has_chunks:
            raise SourceError(
                f"{self.path} is not a datastore: its directory '{layout.METADATA}' is missing; "
                "mount the disk that has it"
            )
        raise SourceError(
            f"{self.path} is not a datastore: it has no directory '{layout.CHUNKS}'{self._nearby()}"
        )

    def _nearby(self) -> str:
        """The directory to name instead, if this one is part of a datastore, or has datastores in it."""
        try:
            if _is_datastore(self.path.parent):
                return f"; name {self.path.parent}"
            with os.scandir(self.path) as entries:
                inside = sorted(
                    e.name for e in islice(entries, _MOST_LOOKED_AT) if _is_datastore(Path(e.path))
                )
        except OSError:
            inside = []
        if not inside:
            return "; name the directory that has it"
        return f"; name a datastore in it: {first_of(map(quoted, inside))}"

    def usage(self) -> Usage:
        """The space of the file system. Raises SourceError, OSError."""
        self.check()  # an unmounted disk's mount point is part of another file system
        found = os.statvfs(self.path)
        return Usage(
            total=found.f_blocks * found.f_frsize,
            used=(found.f_blocks - found.f_bfree) * found.f_frsize,
            available=found.f_bavail * found.f_frsize,
        )


def _is_datastore(path: Path) -> bool:
    """Whether `path` looks like a datastore: it has the chunk store that every datastore has."""
    return (path / layout.CHUNKS).is_dir()

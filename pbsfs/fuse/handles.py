"""Open files and directories: what a handle of the kernel stands for, between open and release.

Called by the operations, from the trio loop's thread; `seek` by the shim, in the same thread.
"""

from __future__ import annotations

import errno
import os

from pbsfs.fuse.pages import HoleReads
from pbsfs.reader.buffers import Buffer
from pbsfs.reader.handle import Handle
from pbsfs.reader.image import Image
from pbsfs.reader.opened import Blob
from pbsfs.reader.pieces import PiecesHandle
from pbsfs.tree import Directory, Listing


class OpenBlob:
    """An open file whose content is in memory."""

    def __init__(self, data: bytes, blob: Blob | None = None) -> None:
        """`blob`: what `data` belongs to, which is shared for as long as somebody holds it."""
        self._blob = blob
        self._data = data

    def read_cached(self, offset: int, size: int) -> Buffer:
        """The bytes from `offset` on, at most `size`."""
        return self._data[offset : offset + size]

    async def read(self, offset: int, size: int) -> Buffer:
        return self.read_cached(offset, size)

    def seek(self, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE of lseek(2). Raises OSError."""
        if not 0 <= offset < len(self._data):
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        return offset if whence == os.SEEK_DATA else len(self._data)

    def close(self) -> None:
        pass


class OpenImage(Handle):
    """An open image. `inode`: the number that it was opened under."""

    def __init__(self, image: Image, inode: int) -> None:
        super().__init__(image)
        self.inode = inode
        self.hole_reads = HoleReads(inode)
        self.images = [image]

    def seek(self, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE of lseek(2). Raises OSError."""
        return _seek(self.image, offset, whence)


class OpenContentsFile:
    """An open file of an archive. `inode`: the number that it was opened under."""

    def __init__(self, file: PiecesHandle, inode: int) -> None:
        self._file = file
        self.inode = inode
        self.hole_reads = HoleReads(inode)
        self.images = file.images
        self.read_cached = file.read_cached
        self.read = file.read
        self.close = file.close

    def seek(self, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE of lseek(2). Raises OSError."""
        return _seek(self._file, offset, whence)


def _seek(file: Image | PiecesHandle, offset: int, whence: int) -> int:
    found = None
    if 0 <= offset < file.size:
        found = file.next_data(offset) if whence == os.SEEK_DATA else file.next_hole(offset)
    if found is None:
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
    return found


OpenFile = OpenBlob | OpenContentsFile | OpenImage


class OpenDirectory:
    """An open directory: one listing for as long as it is open, so that no name is seen twice or skipped.

    `names`: in the order of the listing.
    """

    def __init__(self, directory: Directory, listing: Listing) -> None:
        self.directory = directory
        self.listing = listing
        self.names = list(listing)

"""The kernel's pages that show zeros instead of damaged data: dropped when that is to be tried again.

Otherwise a file that stays open would show the zeros for ever. Used by the operations, in the trio loop.
"""

from __future__ import annotations

import pbsfs.fuse.shim  # noqa: F401 - before pyfuse3, see there

import logging
from collections.abc import Mapping

import pyfuse3
import trio

from pbsfs.fuse.handles import OpenBlob, OpenFile
from pbsfs.fuse.notices import Notices
from pbsfs.reader.damage import ZeroedRanges
from pbsfs.reader.image import Image

log = logging.getLogger(__name__)

ZEROS_LOOKED_AT = 5.0
"""Seconds between two looks at what is shown as zeros; only where `--on-damage zero` was asked for."""


class ZeroPages:
    """The pages of the open files of one mount."""

    def __init__(self, zeroed: ZeroedRanges | None, files: Mapping[int, OpenFile], notices: Notices) -> None:
        """`zeroed`: None if nothing may read as zeros. `files`: those that are open."""
        self._zeroed = zeroed
        self._files = files
        self._notices = notices

    async def run(self) -> None:
        """Has the kernel drop the pages of images whose damaged chunks are due to be tried again."""
        while self._zeroed is not None:
            inodes: dict[Image, set[int]] = {}
            for opened in self._files.values():
                if not isinstance(opened, OpenBlob):
                    for image in opened.images:
                        inodes.setdefault(image, set()).add(opened.inode)
            for image, numbers in inodes.items():
                if image.forget_zeros():
                    for number in numbers:
                        await self._drop(number)
            await trio.sleep(ZEROS_LOOKED_AT)

    async def _drop(self, inode: int) -> None:
        try:
            await self._notices.send(pyfuse3.invalidate_inode, inode)
        except OSError as error:  # the kernel has forgotten the inode meanwhile
            log.debug("inode %d: its pages were not dropped: %s", inode, error.strerror)

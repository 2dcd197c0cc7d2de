"""Writes files to a stream, one after the other. Called by `pbsfs cat`, from a task of the trio loop."""

from __future__ import annotations

import functools
from typing import IO

from pbsfs.base.errors import UsageError
from pbsfs.runtime.threads import in_thread
from pbsfs.tree import BlobFile, ContentsFile, ImageFile, Node

PIECE = 4 << 20
"""Bytes that are read at a time: one chunk of a usual image."""


async def write_file(node: Node, out: IO[bytes]) -> None:
    """Writes all of a file to `out`.

    Raises UsageError for what has no bytes, what reading raises, and OSError.
    """
    if isinstance(node, BlobFile):
        await in_thread(out.write, await node.read(), abandon_on_cancel=True)
    elif isinstance(node, ImageFile | ContentsFile):
        file = (await node.open()).handle(whole=True) if isinstance(node, ImageFile) else await node.open()
        try:
            offset = 0
            while offset < file.size:
                data = await file.read(offset, PIECE)
                offset += len(data)
                await in_thread(functools.partial(out.write, data), abandon_on_cancel=True)
        finally:
            file.close()
    else:
        raise UsageError(f"{node} is not a file; name one")

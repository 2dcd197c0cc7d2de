"""`.pbsfs`: a directory at the root of a mount, of files that say what the mount did.

It is found by its name and not listed, so that programs that walk through a mount don't see it. A file's text
is made when the file is opened. Nothing here waits for the source, or needs memory that is charged: these
files answer when nothing else does. Used by the operations, in the trio loop.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from typing import Any

from pbsfs import __version__
from pbsfs.fuse.mountpoint import WATCH_NAME
from pbsfs.tree import Directory, Listing, Node, Stat


class WatchFile(Node):
    """A file of `.pbsfs`. Its size is 0, as in /proc: `content` makes the text at each call."""

    __slots__ = ("content",)

    def __init__(self, directory: WatchDirectory, name: bytes, content: Callable[[], str]) -> None:
        super().__init__(directory.tree, directory, name)
        self.content = content

    async def stat(self) -> Stat:
        return Stat()


class WatchDirectory(Directory):
    """`.pbsfs` itself.

    Its path begins with a slash, unlike those of all other nodes: where the mount shows an archive, the
    archive may have a file of this name.
    """

    __slots__ = ("_files",)

    def __init__(self, root: Directory, files: Mapping[bytes, Callable[[], str]]) -> None:
        """`root`: what the mount shows at its root. `files`: what makes the text of each file, by name."""
        super().__init__(root.tree, None, b"/" + WATCH_NAME.encode())
        self.parent = root
        self._files: dict[bytes, object] = dict(files)

    async def list_values(self) -> list[tuple[bytes, object]]:
        return list(self._files.items())

    async def children(self) -> Listing:
        return Listing(self, self._files)

    def make(self, name: bytes, value: Any) -> Node:
        return WatchFile(self, name, value)


def version() -> str:
    """The versions of pbsfs and Python, one line each."""
    return f"pbsfs {__version__}\npython {platform.python_version()}\n"

"""`.pbsfs`: a directory at the root of a mount, of files that say what the mount did.

It is found by its name and not listed, so that programs that walk through a mount don't see it. A file's text
is made when the file is opened. Nothing here waits for the source, or needs memory that is charged: these
files answer when nothing else does. Used by the operations, in the trio loop.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pbsfs import __version__
from pbsfs.fuse.mountpoint import WATCH_NAME
from pbsfs.reader.reader import Reader
from pbsfs.runtime.stats import COUNTS
from pbsfs.tree import Directory, Listing, Node, Stat

_MEMORY = Path("/proc/self/statm")


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


class Watch:
    """What a mount did, and what it uses now. `inodes`, `open_files`: how many there are."""

    def __init__(self, reader: Reader, inodes: Callable[[], int], open_files: Callable[[], int]) -> None:
        self._reader = reader
        self._inodes = inodes
        self._open_files = open_files
        self._since = time.monotonic()

    def numbers(self) -> dict[str, int | float]:
        """All of it, by name; sizes are in bytes."""
        store, zeroed = self._reader.store, self._reader.zeroed
        found: dict[str, int | float] = {"uptime_seconds": int(time.monotonic() - self._since)}
        found |= COUNTS
        found["ranges_shown_as_zeros"] = 0 if zeroed is None else zeroed.count
        found["bytes_shown_as_zeros"] = 0 if zeroed is None else zeroed.size
        found["open_files"] = self._open_files()
        found["inodes"] = self._inodes()
        found["cache_bytes"] = store.cache.size
        found["cache_limit_bytes"] = store.cache.room
        found["charged_bytes"] = store.memory.charged()
        found["resident_bytes"] = _resident()
        return found

    def text(self) -> str:
        """One line for each number: its name, a space, and its value."""
        return "".join(f"{name} {_shown(value)}\n" for name, value in self.numbers().items())

    def line(self) -> str:
        """The same in one line, for the log."""
        return " ".join(f"{name}={_shown(value)}" for name, value in self.numbers().items())


def _shown(value: int | float) -> str:
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def version() -> str:
    """The versions of pbsfs and Python, one line each."""
    return f"pbsfs {__version__}\npython {platform.python_version()}\n"


def _resident() -> int:
    """Bytes of memory that the process takes (the second field of statm, proc(5)); 0 where it is unknown."""
    try:
        return int(_MEMORY.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0

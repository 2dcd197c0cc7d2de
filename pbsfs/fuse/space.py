"""How much space the datastore has, for `statfs`: asked in the background, and answered from memory.

`statfs` must answer even if the storage is unreachable: otherwise df(1), and all programs that look at all
mounts, would hang. So it returns the last known values. Used from the trio loop: `last` by the operations,
`keep` as one task for the life of a mount.
"""

from __future__ import annotations

import logging

import trio

from pbsfs.base.errors import PbsfsError
from pbsfs.sources.base import Source, Usage

log = logging.getLogger(__name__)

KEPT = 120.0
"""Seconds after which `last` makes `keep` ask the source again."""


class Space:
    """The space of one source."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._usage: Usage | None = None
        self._asked_at = float("-inf")
        self._wanted = trio.Event()

    def last(self) -> Usage | None:
        """The last known values; None while nothing is known. Makes `keep` ask the source if they are old."""
        if trio.current_time() - self._asked_at >= KEPT:
            self._wanted.set()
        return self._usage

    async def keep(self) -> None:
        """Asks the source at once, and then when `last` requires it: pbsfs sends no requests while idle."""
        while True:
            self._asked_at = trio.current_time()
            try:
                self._usage = await self._source.usage()
            except PbsfsError as error:
                log.debug("%s: space not updated: %s", self._source, error)
            except Exception:
                log.exception("asking for the space of %s failed", self._source)  # the mount goes on
            self._wanted = trio.Event()
            await self._wanted.wait()

"""How much space the datastore has, for `statfs`: asked in the background, and answered from memory.

`statfs` must answer when the storage below does not: df(1), and whatever else looks at all mounts, would
hang with it. So it gets what was known last. Used from the trio loop: `last` by the operations, `keep`
as one task for the life of a mount.
"""

from __future__ import annotations

import logging

import trio

from pbsfs.base.errors import PbsfsError
from pbsfs.sources.base import Source, Usage

log = logging.getLogger(__name__)

KEPT = 120.0
"""Seconds after which `last` has the source asked again."""


class Space:
    """The space of one source."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._usage: Usage | None = None
        self._asked_at = float("-inf")
        self._wanted = trio.Event()

    def last(self) -> Usage | None:
        """What was known last; None as long as nothing is known. Where it is old, has the source asked."""
        if trio.current_time() - self._asked_at >= KEPT:
            self._wanted.set()
        return self._usage

    async def keep(self) -> None:
        """Asks the source at once, and then when `last` wants it: nothing is asked while nobody looks."""
        while True:
            self._asked_at = trio.current_time()
            try:
                self._usage = await self._source.usage()
            except PbsfsError as error:
                log.debug("the space of %s stays as it was: %s", self._source, error)
            except Exception:
                log.exception("asking for the space of %s failed", self._source)  # no reason to end a mount
            self._wanted = trio.Event()
            await self._wanted.wait()

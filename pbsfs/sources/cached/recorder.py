"""Keeps the newest answers of a source for `--offline`: those that may change, which the cache never gives.

Used by `CachedSource`, from tasks of one trio loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable

import trio

from pbsfs.runtime.threads import in_thread
from pbsfs.sources.cached.files import Name
from pbsfs.sources.cached.keeper import Item
from pbsfs.sources.cached.records import Place

_AGAIN = 600
"""Seconds after which an answer that has not changed is kept with its new time."""

_MOST_KNOWN = 10_000
"""Records whose content is remembered, so that the same is not written again at once."""


class Recorder:
    """The records of one source."""

    def __init__(self, identity: str | None, offer: Callable[[Item], Awaitable[bool]]) -> None:
        """`identity`: names the source and its user; None to keep nothing. `offer`: has an item written, and
        returns whether it will be."""
        self._identity = identity
        self._offer = offer
        self._known: dict[Name, tuple[bytes, float]] = {}  # digests, and when they were kept

    async def keep(self, what: str, of: str, pack: Callable[[], bytes]) -> None:
        """Keeps an answer. `what`, `of`: see `Place`. `pack`: its bytes; called in a thread."""
        if self._identity is None:
            return
        place = Place(self._identity, what, of)

        def packed() -> tuple[Name, bytes, bytes]:
            body = pack()
            digest = hashlib.sha256(body).digest()
            return place.own, digest, place.pack(body, digest)

        name, digest, record = await in_thread(packed)
        known, when = self._known.get(name, (b"", 0.0))
        now = trio.current_time()
        if known == digest and now - when < _AGAIN:
            return
        if await self._offer(Item(name, record, replace=True)):
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[name] = digest, now

"""Decoded chunks, bounded in bytes. The least recently used chunk is dropped first, in a copy the oldest one.

The chunk store fills it from the trio loop. Any thread may look chunks up and change the bound.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable


class ChunkCache:
    """At most `room` bytes of decoded chunks; `size` is what they take now.

    `is_for_copy`: chunks are read once and in order, so reading one is no reason to keep it.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.size = 0
        self.is_for_copy = False
        self._chunks: OrderedDict[Hashable, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> bytes | None:
        with self._lock:
            data = self._chunks.get(key)
            if data is not None and not self.is_for_copy:
                self._chunks.move_to_end(key)
            return data

    def expect(self, key: Hashable) -> bool:
        """Whether the chunk is there; one that is will be read soon, so it becomes the last to be dropped."""
        with self._lock:
            if key not in self._chunks:
                return False
            self._chunks.move_to_end(key)
            return True

    def put(self, key: Hashable, data: bytes) -> None:
        """Adds `data`, and drops chunks until all fit. Does nothing if `data` alone does not fit."""
        if len(data) > self.room:
            return
        with self._lock:
            old = self._chunks.pop(key, None)
            self.size += len(data) - (len(old) if old is not None else 0)
            self._chunks[key] = data
            self._shrink()

    def resize(self, room: int) -> None:
        """Changes the bound to `room` bytes."""
        with self._lock:
            self.room = room
            self._shrink()

    def _shrink(self) -> None:
        while self.size > self.room:
            _key, dropped = self._chunks.popitem(last=False)
            self.size -= len(dropped)

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._chunks

"""Decoded chunks, bounded in bytes, least recently used first out.

Used from the trio loop and, for look-ups, from any other thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

LEAST_ROOM = 32 << 20
"""Bytes of chunks that are kept however much is reserved: two chunks of the largest size that exists."""


class ChunkCache:
    """Holds at most `capacity` bytes of decoded chunks, less what is reserved.

    `room`: bytes of chunks that it holds at most now.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = self.room = capacity
        self.size = 0
        self._chunks: OrderedDict[Hashable, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> bytes | None:
        with self._lock:
            data = self._chunks.get(key)
            if data is not None:
                self._chunks.move_to_end(key)
            return data

    def put(self, key: Hashable, data: bytes) -> None:
        """Keeps `data`, and drops what was not used for longest; does nothing where it could never fit."""
        if len(data) > self.room:
            return
        with self._lock:
            old = self._chunks.pop(key, None)
            self.size += len(data) - (len(old) if old is not None else 0)
            self._chunks[key] = data
            self._shrink()

    def reserve(self, size: int) -> None:
        """Leaves `size` bytes of the capacity to buffers that a door holds for what was read."""
        with self._lock:
            self.room = max(self.capacity - size, min(self.capacity, LEAST_ROOM))
            self._shrink()

    def _shrink(self) -> None:
        while self.size > self.room:
            _key, dropped = self._chunks.popitem(last=False)
            self.size -= len(dropped)

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._chunks

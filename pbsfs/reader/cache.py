"""Decoded chunks, bounded in bytes, least recently used first out.

Used from the trio loop and, for look-ups, from any other thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable


class ChunkCache:
    """Holds at most `capacity` bytes of decoded chunks."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
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
        if len(data) > self.capacity:
            return
        with self._lock:
            old = self._chunks.pop(key, None)
            self.size += len(data) - (len(old) if old is not None else 0)
            self._chunks[key] = data
            while self.size > self.capacity:
                _key, dropped = self._chunks.popitem(last=False)
                self.size -= len(dropped)

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._chunks

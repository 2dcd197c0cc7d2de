"""Decoded chunks, bounded in bytes. The least recently used is dropped first; in a copy, one that was read.

The chunk store fills it from the trio loop. Any thread may look chunks up and change the bound.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

BEHIND = 5
"""In a copy, chunks that were read keep a fifth of the room: some occur again soon."""


class ChunkCache:
    """At most `room` bytes of decoded chunks; `size` is what they take now.

    `is_for_copy`: each chunk is read once, and most of them never again.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.size = 0
        self.is_for_copy = False
        self._chunks: OrderedDict[Hashable, bytes] = OrderedDict()
        self._behind: OrderedDict[Hashable, int] = OrderedDict()  # in a copy: what was read, and its bytes
        self._size_behind = 0
        self._lock = threading.Lock()

    @property
    def room_ahead(self) -> int:
        """Bytes for chunks that are to be read. Half: those that were read stay as long, but in a copy."""
        return self.room - self.room // (BEHIND if self.is_for_copy else 2)

    def get(self, key: Hashable) -> bytes | None:
        with self._lock:
            data = self._chunks.get(key)
            if data is not None:
                self._note_read(key, data)
            return data

    def expect(self, key: Hashable) -> bool:
        """Whether the chunk is there; one that is will be read soon, so it becomes the last to be dropped."""
        with self._lock:
            if key not in self._chunks:
                return False
            self._chunks.move_to_end(key)
            self._size_behind -= self._behind.pop(key, 0)
            return True

    def put(self, key: Hashable, data: bytes, *, is_read: bool = False) -> None:
        """Adds `data`, and drops chunks until all fit. Does nothing if `data` alone does not fit.

        `is_read`: somebody reads it now, without `get`.
        """
        if len(data) > self.room:
            return
        with self._lock:
            if key in self._chunks:
                self._drop(key)
            self._chunks[key] = data
            self.size += len(data)
            self._shrink()
            if is_read:
                self._note_read(key, data)

    def resize(self, room: int) -> None:
        """Changes the bound to `room` bytes."""
        with self._lock:
            self.room = room
            self._shrink()

    def _shrink(self) -> None:
        while self.size > self.room:
            self._drop(next(iter(self._chunks)))

    def _drop(self, key: Hashable) -> None:
        self.size -= len(self._chunks.pop(key))
        self._size_behind -= self._behind.pop(key, 0)

    def _note_read(self, key: Hashable, data: bytes) -> None:
        if not self.is_for_copy:
            self._chunks.move_to_end(key)
            return
        if key in self._behind:
            self._behind.move_to_end(key)
        else:
            self._behind[key] = len(data)
            self._size_behind += len(data)
            # Not the last one: a large chunk is read in several pieces.
            while self._size_behind > self.room // BEHIND and len(self._behind) > 1:
                self._drop(next(iter(self._behind)))

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._chunks

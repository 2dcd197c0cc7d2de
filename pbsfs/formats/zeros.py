"""Digests of zeros: a chunk that has one is a hole.

One `ZeroDigests` serves all indexes of a reader. A key's part of a digest follows the data (`Key.finish`), so
all keys share the hash of the zeros before it: the tenth key costs no more than the first. Chunk sizes are
powers of two, so only few hashes are kept. Usable from any thread; a length that is not kept takes a while to
hash (16 MiB: some 10 ms), which belongs in a worker thread.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from pbsfs.formats.keys import Key

if TYPE_CHECKING:
    from hashlib import _Hash as Sha256


class ZeroDigests:
    """Digests of chunks of zeros, by length and key."""

    def __init__(self) -> None:
        self._hashed: dict[int, Sha256] = {}  # by length, of powers of two only

    def digest(self, length: int, key: Key | None) -> bytes:
        """The digest (32 bytes) of `length` zero bytes; `key`: the one that encrypts the chunk, if any."""
        hashed = self._hashed.get(length)
        if hashed is None:
            hashed = hashlib.sha256(bytes(length))
            if length & (length - 1) == 0:
                self._hashed[length] = hashed
        return hashed.digest() if key is None else key.finish(hashed)

    def work(self, length: int) -> int:
        """Bytes that `digest` has to hash for a chunk of `length` bytes."""
        return 0 if length in self._hashed else length

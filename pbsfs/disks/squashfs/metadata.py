"""The metadata of squashfs: blocks of up to 8 KiB, packed one after the other, and tables of them.

Of one thread; used by the other modules here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from pbsfs.base.errors import DamageError
from pbsfs.disks.squashfs.compression import decompress
from pbsfs.disks.volume import Volume

SIZE = 8 << 10
"""Bytes that a block holds at most, and that it takes at most, without its head."""

_HEAD = 2
_PLAIN = 0x8000
_KEPT = 256


class Metadata:
    """The blocks of a volume that is compressed with the kind `compressor`."""

    def __init__(self, volume: Volume, compressor: int) -> None:
        self._volume = volume
        self._compressor = compressor
        self.block = functools.lru_cache(_KEPT)(self._load)

    def _load(self, place: int) -> tuple[bytes, int]:
        """What the block at `place` holds, and where the next one begins. Raises DamageError."""
        if not 0 <= place <= self._volume.size - _HEAD:
            raise DamageError(f"the metadata at byte {place} lies beyond the file system")
        raw = self._volume.read(place, min(_HEAD + SIZE, self._volume.size - place))
        head = int.from_bytes(raw[:_HEAD], "little")
        length = head & ~_PLAIN
        data = raw[_HEAD : _HEAD + length]
        if not 0 < length <= SIZE or len(data) != length:
            raise DamageError(f"the metadata at byte {place} has a wrong length")
        if not head & _PLAIN:
            try:
                data = decompress(self._compressor, data, SIZE)
            except DamageError as error:
                raise DamageError(f"the metadata at byte {place}: {error}") from None
            if not data:
                raise DamageError(f"the metadata at byte {place} is empty")
        return data, place + _HEAD + length

    def at(self, place: int, offset: int) -> Cursor:
        """What begins at `offset` of the block at `place`."""
        return Cursor(self, place, offset)

    def entry(self, places: list[int], number: int, size: int) -> bytes:
        """The `number`th row, of `size` bytes, of a table whose blocks are at `places`. Raises
        DamageError."""
        block, offset = divmod(number * size, SIZE)
        if block >= len(places):
            raise DamageError(f"a table ends before its row {number}")
        return self.at(places[block], offset).read(size)

    def places(self, table: int, rows: int, size: int) -> list[int]:
        """Where the blocks are of a table of `rows` rows of `size` bytes; `table`: where that is said."""
        count = -(-rows * size // SIZE)
        raw = self._volume.read(table, count * 8)
        return [int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8)]

    def prefetch(self, places: Iterable[int]) -> None:
        """Requests the blocks at `places`, side by side."""
        most = self._volume.size
        self._volume.prefetch(
            [(place, min(_HEAD + SIZE, most - place)) for place in places if 0 <= place < most]
        )


class Cursor:
    """A place in metadata, from which reading continues into the next blocks."""

    def __init__(self, metadata: Metadata, place: int, offset: int) -> None:
        self._metadata = metadata
        self.place = place
        self.offset = offset

    def read(self, size: int) -> bytes:
        """The next `size` bytes. Raises DamageError."""
        parts: list[bytes] = []
        missing = size
        while missing:
            data, after = self._metadata.block(self.place)
            part = data[self.offset : self.offset + missing]
            if not part:
                if self.offset > len(data):
                    raise DamageError(f"the metadata at byte {self.place} ends early")
                self.place, self.offset = after, 0
                continue
            parts.append(part)
            missing -= len(part)
            self.offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

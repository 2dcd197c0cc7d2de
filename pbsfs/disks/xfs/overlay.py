"""What log recovery changes on a volume, in memory. Of one thread; used by `recovery` and `blocks`."""

from __future__ import annotations

from collections.abc import Sequence

from pbsfs.base.errors import DamageError
from pbsfs.disks.volume import Volume

SECTOR = 512

MOST_BYTES = 56 << 20
"""Memory for changed sectors."""

_OVERHEAD = 130
"""Bytes that Python needs for a sector, about."""


class TooLargeError(DamageError):
    """The log changes more than fits into memory."""


class Overlay:
    """A volume with changed sectors."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._sectors: dict[int, bytes] = {}  # without the zeros at their ends
        self._held = 0

    def __len__(self) -> int:
        return len(self._sectors)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes. Raises DamageError, KeyRequiredError, SourceError."""
        data = self._volume.read(offset, size)
        if not self._sectors:
            return data
        changed: bytearray | None = None
        for sector in range(offset // SECTOR, -(-(offset + size) // SECTOR)):
            stored = self._sectors.get(sector)
            if stored is None:
                continue
            if changed is None:
                changed = bytearray(data)
            start = sector * SECTOR - offset
            first, last = max(0, -start), min(SECTOR, size - start)
            changed[start + first : start + last] = stored.ljust(SECTOR, b"\0")[first:last]
        return data if changed is None else bytes(changed)

    def prefetch(self, offsets: Sequence[int], size: int) -> None:
        """Requests `size` bytes from each of `offsets` on, as far as they lie in the volume."""
        most = self._volume.size
        self._volume.prefetch([(offset, min(size, most - offset)) for offset in offsets if offset < most])

    def changed(self, offset: int, size: int) -> bool:
        """Whether any sector of a range comes from the log."""
        sectors = self._sectors
        return bool(sectors) and any(
            sector in sectors for sector in range(offset // SECTOR, -(-(offset + size) // SECTOR))
        )

    def write(self, offset: int, data: bytes) -> None:
        """Raises TooLargeError; DamageError for what lies beyond the volume."""
        if not data:
            return
        first, end = offset // SECTOR, -(-(offset + len(data)) // SECTOR)
        if offset % SECTOR or len(data) % SECTOR:
            whole = bytearray(self.read(first * SECTOR, (end - first) * SECTOR))
            whole[offset - first * SECTOR : offset - first * SECTOR + len(data)] = data
            data = bytes(whole)
        else:
            self._volume.check(offset, len(data))
        for sector in range(first, end):
            at = (sector - first) * SECTOR
            self._put(sector, data[at : at + SECTOR].rstrip(b"\0"))

    def fill(self, offset: int, sector: bytes, count: int) -> None:
        """Writes one sector `count` times, which are held once."""
        self._volume.check(offset, count * SECTOR)
        for number in range(offset // SECTOR, offset // SECTOR + count):
            self._put(number, sector)

    def clear(self) -> None:
        self._sectors.clear()
        self._held = 0

    def _put(self, sector: int, data: bytes) -> None:
        old = self._sectors.get(sector)
        self._held += len(data) - len(old) if old is not None else len(data) + _OVERHEAD
        if self._held > MOST_BYTES:
            raise TooLargeError(f"its changes take more than {MOST_BYTES >> 20} MiB")
        self._sectors[sector] = data

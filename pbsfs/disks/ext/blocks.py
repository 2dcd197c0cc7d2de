"""The blocks of an ext file system, as they are after the replay of its journal.

Of one thread. Blocks are read in windows, because metadata lies together and each read of a volume costs.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pbsfs.base.errors import DamageError
from pbsfs.disks.ext.superblock import kernel_crc
from pbsfs.disks.volume import Volume

WINDOW = 64 << 10
"""Bytes of a window, aligned; no block is larger."""

WINDOWS = 128
"""Windows that are kept: 8 MiB."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A block as the journal has it, in block `place` of the volume. `escaped`: it begins with the journal's
    magic number, which the journal replaces by zeros. `checksum`: None, or the CRC-32C of `seed` and the
    block, modulo 2 to the power of `bits`."""

    place: int
    escaped: bool
    checksum: int | None = None
    seed: int = 0
    bits: int = 32


class Blocks:
    """Blocks of `size` bytes of `volume`. `copies`: those that the journal supplies, by number."""

    def __init__(self, volume: Volume, size: int, copies: Mapping[int, Copy] | None = None) -> None:
        self.volume = volume
        self.size = size
        self._copies = copies or {}
        self._numbers = sorted(self._copies)
        self._window = functools.lru_cache(WINDOWS)(self._load)

    def read(self, number: int) -> bytes:
        """The block `number`. Raises DamageError where it does not lie in the volume, or where the journal's
        copy is damaged."""
        copy = self._copies.get(number)
        return self._stored(number) if copy is None else self._copied(number, copy)

    def copied(self, first: int, count: int) -> Sequence[int]:
        """The numbers of those of `count` blocks that the journal supplies, in order."""
        if not self._numbers:
            return ()
        start = bisect.bisect_left(self._numbers, first)
        return self._numbers[start : bisect.bisect_left(self._numbers, first + count, start)]

    def stretches(self, first: int, count: int) -> Sequence[tuple[int, int, bool]]:
        """`count` blocks as stretches: first block, how many, and whether the journal supplies them."""
        copied = self.copied(first, count)
        if not copied:
            return [(first, count, False)]
        found: list[tuple[int, int, bool]] = []
        at = first
        for number in copied:
            if number > at:
                found.append((at, number - at, False))
            found.append((number, 1, True))
            at = number + 1
        if at < first + count:
            found.append((at, first + count - at, False))
        return found

    def _copied(self, number: int, copy: Copy) -> bytes:
        data = self._stored(copy.place)
        if copy.checksum is not None:
            wrong = kernel_crc(copy.seed, data) ^ copy.checksum
            if wrong & ((1 << copy.bits) - 1):
                raise DamageError(f"block {number}: its copy in the journal has a wrong checksum")
        return b"\xc0\x3b\x39\x98" + data[4:] if copy.escaped else data

    def _stored(self, number: int) -> bytes:
        start = number * self.size
        window, offset = divmod(start, WINDOW)
        try:
            data = self._window(window)
        except DamageError:  # perhaps of another block in it
            return self.volume.read(start, self.size)
        block = data[offset : offset + self.size]
        return block if len(block) == self.size else self.volume.read(start, self.size)

    def _load(self, window: int) -> bytes:
        start = window * WINDOW
        return self.volume.read(start, max(min(WINDOW, self.volume.size - start), 0))

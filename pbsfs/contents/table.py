"""The goodbye table of a directory: where its entries are, by the hashes of their names.

`Items` reads it; `Archive` and `Hints` use it. The positions that `ends` and `places` return lie in the
directory; what is there may be anything. Immutable, for any thread.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from pbsfs.contents.faults import Faults, damaged
from pbsfs.formats.pxar import ITEM, ITEM_SIZE, hash_name


class Table(NamedTuple):
    """`start`: of the directory. `goodbye`: where the table starts. `rows`: its items as they are stored."""

    start: int
    goodbye: int
    rows: bytes

    def ends(self, faults: Faults) -> dict[int, int]:
        """Where each entry ends, if it is a directory, by its position. Adds to `faults` what cannot be."""
        start, goodbye, rows = self
        ends: dict[int, int] = {}
        for _hash, offset, size in ITEM.iter_unpack(rows):
            position = goodbye - offset
            if not start < position < goodbye or position in ends:
                faults.add(damaged(goodbye, "a directory's table points to what is not in it"))
            else:
                ends[position] = position + size
        return ends

    def by_hash(self) -> dict[int, int]:
        """The position of each entry by the hash of its name; of several with one hash, any."""
        return {digest: self.goodbye - offset for digest, offset, _size in ITEM.iter_unpack(self.rows)}

    def places(self, name: bytes) -> list[tuple[int, int]]:
        """Position and end of each entry that may be called `name`, in rising order.

        A search of the whole table: it finds what is there, though the table's order is wrong.
        """
        start, goodbye, rows = self
        wanted = struct.pack("<Q", hash_name(name))
        found = []
        at = rows.find(wanted)
        while at >= 0:
            if at % ITEM_SIZE == 0:
                _hash, offset, size = ITEM.unpack_from(rows, at)
                position = goodbye - offset
                if start < position < goodbye:
                    found.append((position, position + size))
            at = rows.find(wanted, at + 1)
        return sorted(found)

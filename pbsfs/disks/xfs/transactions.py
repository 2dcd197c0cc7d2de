"""The transactions of a log that were committed, as items. Used by `recovery`; of one thread."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from pbsfs.base.errors import DamageError
from pbsfs.disks.xfs.log import Log
from pbsfs.disks.xfs.overlay import TooLargeError

MOST_HELD = 96 << 20
"""Bytes of transactions that are not yet committed."""

_MOST_REGIONS = 1024
_HEADER = b"NART"
_HEADER_SIZE = 16
_ITEM = struct.Struct("<HH")


class Item(NamedTuple):
    """A change: its kind, and its regions, of which the first says what it is."""

    kind: int
    regions: list[bytes]


class Transaction:
    """A transaction that was committed. `lsn`: of the record that it begins in."""

    def __init__(self, lsn: int, regions: list[bytes]) -> None:
        self.lsn = lsn
        self._regions = regions

    def items(self, *, forget: bool = False) -> Iterator[Item]:
        """`forget`: those that the caller has seen are gone afterwards. Raises DamageError."""
        regions = self._regions
        at = 0
        while at < len(regions):
            if len(regions[at]) < _ITEM.size:
                raise DamageError("an item is cut off")
            kind, count = _ITEM.unpack_from(regions[at])
            if not 0 < count <= _MOST_REGIONS or at + count > len(regions):
                raise DamageError("an item is cut off")
            item = Item(kind, regions[at : at + count])
            if forget:
                regions[at : at + count] = [b""] * count
            at += count
            yield item


class _Open:
    """A transaction of which the end was not read yet."""

    def __init__(self, lsn: int) -> None:
        self.lsn = lsn
        self.header = b""
        self.regions: list[bytes] = []
        self.held = 0


def committed(log: Log) -> Iterator[Transaction]:
    """The transactions in the order in which they were committed. Raises DamageError, TooLargeError."""
    pending: dict[bytes, _Open] = {}
    held = 0
    for operation in log.operations():
        if operation.is_start:
            old = pending.pop(operation.transaction, None)
            held -= old.held if old else 0
            pending[operation.transaction] = _Open(operation.lsn)
            continue
        found = pending.get(operation.transaction)
        if found is None:
            continue  # it began before the tail
        if operation.is_commit or operation.is_unmount:
            del pending[operation.transaction]
            held -= found.held
            if operation.is_commit:
                yield Transaction(found.lsn, found.regions)
            continue
        data = operation.data
        if not data:
            continue
        if len(found.header) < _HEADER_SIZE:
            found.header += data
            if len(found.header) > _HEADER_SIZE or found.header[:4] != _HEADER[: len(found.header)]:
                raise DamageError("a transaction has a wrong header")
            continue
        if operation.continues:
            if not found.regions:
                raise DamageError("a transaction begins with the end of a region")
            found.regions[-1] += data
        else:
            found.regions.append(data)
        size = len(data) + 64
        found.held += size
        held += size
        if held > MOST_HELD:
            raise TooLargeError(f"its transactions take more than {MOST_HELD >> 20} MiB")

"""The state of the journal, $LogFile: whether changes in it are not on the volume yet.

Layout: "NTFS Documentation" of the Linux-NTFS project, "$LogFile", restart pages. pbsfs does not replay it.
"""

from __future__ import annotations

import struct

from pbsfs.base.errors import DamageError
from pbsfs.disks.ntfs.records import STRIDE, without_fixups
from pbsfs.disks.ntfs.streams import Stream

CLEAN = "clean"
OPEN = "not replayed: the volume was in use; the latest changes may be missing or incomplete"

_PAGE = struct.Struct("<16xIIH")
_AREA = struct.Struct("<QHHHH")
_NO_CLIENT = 0xFFFF
_IS_CLEAN = 2
_MOST_PAGE = 64 << 10


def read_state(log: Stream) -> str:
    """`clean`, or `not replayed: …`. Raises DamageError, KeyRequiredError, SourceError."""
    start = log.read(0, min(STRIDE, log.size))
    if not start or start.count(0xFF) == len(start):
        return CLEAN  # as Linux leaves it
    size = _page_size(start)
    found: tuple[int, bool] | None = None
    problem = DamageError("it has no restart page")
    for place in (0, size):
        try:
            page = log.read(place, size)
            if page.startswith(b"CHKD"):
                return CLEAN  # chkdsk has repaired the volume
            state = _read_page(without_fixups(page, b"RSTR"))
        except DamageError as error:
            problem = error
            continue
        if found is None or state > found:
            found = state
    if found is None:
        raise problem
    return CLEAN if found[1] else OPEN


def _page_size(start: bytes) -> int:
    if start[:4] in {b"RSTR", b"CHKD"}:
        size: int = _PAGE.unpack_from(start)[0]
        if STRIDE <= size <= _MOST_PAGE and not size & (size - 1):
            return size
    return 4096


def _read_page(page: bytes) -> tuple[int, bool]:
    """The number of the last change that a restart page knows, and whether the volume is clean."""
    _system, _log, offset = _PAGE.unpack_from(page)
    if offset + _AREA.size > len(page):
        raise DamageError("its restart page is damaged")
    number, _clients, _free, in_use, flags = _AREA.unpack_from(page, offset)
    return number, in_use == _NO_CLIENT or flags & _IS_CLEAN != 0

"""Which sequence numbers the names that were read have for records: a record that was used again has another.

Bounded: the numbers of the ranges of records that were noted longest ago are dropped. Of one thread.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict

_EACH = 4096
_MOST = 1024


class Sequences:
    """16 bits for each record, for up to 4 million records."""

    def __init__(self) -> None:
        self._pages: OrderedDict[int, array[int]] = OrderedDict()

    def note(self, number: int, sequence: int) -> bool:
        """Whether no other sequence number was noted for this record; notes it then."""
        page = self._pages.get(number // _EACH)
        if page is None:
            page = self._pages[number // _EACH] = array("H", bytes(2 * _EACH))
            if len(self._pages) > _MOST:
                self._pages.popitem(last=False)
        known = page[number % _EACH]
        if known and known != sequence:
            return False
        page[number % _EACH] = sequence
        return True

    def forget(self, number: int) -> None:
        page = self._pages.get(number // _EACH)
        if page is not None:
            page[number % _EACH] = 0

    def of(self, number: int) -> int:
        """0 where none was noted."""
        page = self._pages.get(number // _EACH)
        return page[number % _EACH] if page is not None else 0

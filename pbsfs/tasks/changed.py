"""What differs between two images, by the digests in their indexes alone: no chunk is read.

Used by `diff` and `mapping`, in worker threads.
"""

from __future__ import annotations

from collections.abc import Iterator

import trio

from pbsfs.reader.bridge import digest_of
from pbsfs.reader.damage import Range, merged
from pbsfs.reader.image import Image

IN_ONE_GO = 1000
"""Chunks that are compared between two looks for an end."""


def changed_chunks(old: Image, new: Image) -> Iterator[int]:
    """The chunks of `new` that `old` does not have at the same place, by their indexes: another digest.

    Holes are the same, whichever keys they were made with. Call in a worker thread.
    """
    before, after = old.index, new.index
    number = 0
    for place in range(after.count):
        start, end = after.span(place)
        while number < before.count and before.span(number)[0] < start:
            number += 1
        same = (
            number < before.count
            and before.span(number) == (start, end)
            and (
                (before.is_hole(number) and after.is_hole(place))
                or digest_of(old, number) == digest_of(new, place)
            )
        )
        if not same:
            yield place
        if place % IN_ONE_GO == 0:
            trio.from_thread.check_cancelled()


def changed_ranges(old: Image, new: Image) -> list[Range]:
    """The ranges of `new` that differ from `old`: see `changed_chunks`.

    What lies behind the end of the shorter one counts as changed. Call in a worker thread.
    """
    ranges: list[Range] = []
    for place in changed_chunks(old, new):
        start, end = new.index.span(place)
        if ranges and ranges[-1].offset + ranges[-1].length == start:
            ranges[-1] = Range(ranges[-1].offset, end - ranges[-1].offset)
        else:
            ranges.append(Range(start, end - start))
    if new.size < old.size:
        ranges.append(Range(new.size, old.size - new.size))
    return merged(ranges)

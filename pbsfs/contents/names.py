"""Finds entries of an archive by their names without reading all of it.

The metadata of an archive of version 2 lie together, so a search for the bytes of names finds candidates
faster than going through all entries. A candidate is trusted only where the tables of the directories lead to
it: file attributes may hold the same bytes. From any thread.
"""

from __future__ import annotations

import re
from array import array

from pbsfs.contents.base import Stream
from pbsfs.formats import pxar

STEP = 1 << 20
"""Bytes that are searched in one go."""

_MARK = re.escape(pxar.FILENAME.to_bytes(8, "little"))
_LONGEST = pxar.HEADER_SIZE + pxar.MAX_NAME + 1


def candidates(stream: Stream, start: int, end: int, name: re.Pattern[bytes]) -> array[int]:
    """Where FILENAME items seem to be whose name matches, from `start` to `end`, in rising order.

    `name`: matches neither NUL nor a slash. Raises DamageError, KeyRequiredError, SourceError.
    """
    # What follows the mark is only looked at, so that no candidate hides one that begins in it.
    wanted = re.compile(_MARK + rb"(?=(?s:.{8})(?:" + name.pattern + rb")\0)", name.flags & re.IGNORECASE)
    found = array("Q")
    while start < end:
        data = stream.pread(start, min(STEP + _LONGEST, end - start))
        found.extend(start + match.start() for match in wanted.finditer(data) if match.start() < STEP)
        start += STEP
    return found

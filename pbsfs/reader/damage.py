"""Which ranges of images read as zeros because their chunks are damaged.

pbsfs returns zeros only if the user asked for them, and only for chunks that are missing or fail their
checks: never for a wrong key or a failed signature, which concern all of an image. It logs each range once,
and remembers it. Images and the reports of commands use this, from any thread.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import NamedTuple

log = logging.getLogger(__name__)

MAX_REMEMBERED = 100_000
"""Ranges that are kept with their place; pbsfs only counts more."""

MAX_LISTED = 200
"""Ranges of one image that one report lists."""


ZEROS_LAST = 60.0
"""Seconds for which a damaged chunk is shown as zeros before it is tried again: it may be repaired, but
each try costs its reader the time that it takes to be sure."""


class Range(NamedTuple):
    """`length` bytes from `offset` of an image."""

    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.offset}+{self.length}"


class ZeroedRanges:
    """The ranges that read as zeros instead of damaged data, by image."""

    def __init__(self) -> None:
        self._ranges: dict[str, set[Range]] = {}
        self._lock = threading.Lock()
        self.count = 0
        self.size = 0

    def add(self, image: str, where: Range, reason: str) -> None:
        """`reason`: the error that a read would have failed with; it names image, place and chunk."""
        with self._lock:
            known = self._ranges.setdefault(image, set())
            if where in known:
                return
            self.count += 1
            self.size += where.length
            if self.count <= MAX_REMEMBERED:
                known.add(where)
        fields = {"image": image, "offset": where.offset, "length": where.length}
        log.warning("%s; these %d bytes are shown as zeros", reason, where.length, extra=fields)

    def of(self, image: str) -> list[Range]:
        """The ranges of one image, neighbours merged, in order."""
        with self._lock:
            ranges = list(self._ranges.get(image, ()))
        return merged(ranges)

    def text_of(self, image: str) -> str:
        """The same as text: `offset+length`, separated by commas."""
        ranges = self.of(image)
        return ",".join([*map(str, ranges[:MAX_LISTED]), *(["…"] if len(ranges) > MAX_LISTED else [])])

    def log_all(self) -> None:
        """Logs all ranges that were shown as zeros, at the end of a mount."""
        if self.count:
            log.warning("%d damaged ranges, %d bytes in all, were shown as zeros:", self.count, self.size)
        for image in self._ranges:
            log.warning("%s: %s", image, self.text_of(image), extra={"image": image})


class ZeroedChunks:
    """The damaged chunks of one image that read as zeros for now."""

    def __init__(self) -> None:
        self._found: dict[int, float] = {}  # when each was last found damaged, by time.monotonic()

    def add(self, number: int) -> None:
        """Takes note that chunk `number` was found damaged now."""
        self._found[number] = time.monotonic()

    def shows(self, number: int) -> bool:
        """Whether chunk `number` reads as zeros without being tried again."""
        return number in self._found and not self._is_due(number)

    def forget_due(self) -> bool:
        """Forgets the chunks that are to be tried again; whether there were any."""
        due = [number for number in list(self._found) if self._is_due(number)]
        for number in due:
            self._found.pop(number, None)
        return bool(due)

    def _is_due(self, number: int) -> bool:
        return time.monotonic() - self._found.get(number, -math.inf) >= ZEROS_LAST


def merged(ranges: list[Range]) -> list[Range]:
    """`ranges` in order, those that touch made one."""
    result: list[Range] = []
    for found in sorted(ranges):
        if result and found.offset <= result[-1].offset + result[-1].length:
            end = max(found.offset + found.length, result[-1].offset + result[-1].length)
            result[-1] = Range(result[-1].offset, end - result[-1].offset)
        else:
            result.append(found)
    return result

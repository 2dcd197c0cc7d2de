"""Limits for tests with mutated disks, and how many of these a run takes."""

from __future__ import annotations

import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from pbsfs.disks import sandbox
from tests.support.disks import Patched

MEMORY = sandbox.MEMORY - (100 << 20)
"""Bytes of address space for one disk: what the parser's process has, without the interpreter's own."""

SECONDS = 20.0
"""Seconds of the processor for all that is read from one disk: much less than the parser's process gets."""


def counts(quick: int, long: int) -> list[Any]:
    """Values of a parameter: how many mutations the quick run takes, and how many the long one takes beyond
    these."""
    return [quick, pytest.param(long, marks=pytest.mark.long)]


def mutate(disk: Patched, place: Callable[[], int], some: random.Random) -> None:
    """Replaces the changes of a disk by others: some bytes, at what `place` returns for each."""
    disk.changes = {}
    for _ in range(some.choice((1, 1, 2, 5, 20))):
        at = place()
        disk.changes[at] = bytes([some.choice((0, 1, 128, 255, some.randrange(256)))])


@contextmanager
def limited() -> Iterator[None]:
    """Fails where a reader takes too long, and where it takes too much memory (MemoryError)."""

    def too_long(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"it takes more than {SECONDS} s of the processor")

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

"""The process's memory allocator, set for work with many buffers of some megabytes.

glibc gives each thread an arena of its own, and a chunk that one thread decodes and another drops
leaves a hole in the arena that the next thread can't use: a mount with a cache of 256 MiB took
650 MiB. With one arena for all it takes 340 MiB, and is a quarter faster, since memory that is in
use already needs no page faults. Called once at the start of a process, before there are threads.
"""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8  # malloc.h


def use_one_arena() -> None:
    """Makes all threads share one arena. Does nothing where the C library has no such setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)

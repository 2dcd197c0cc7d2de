"""Settings of the process itself, made once at its start, before there are threads."""

from __future__ import annotations

import ctypes
import resource

_M_ARENA_MAX = -8  # malloc.h
_PR_SET_DUMPABLE = 4  # linux/prctl.h


def use_one_arena() -> None:
    """Makes all threads share one arena of the allocator; does nothing where the C library has no arenas.

    glibc gives each thread an arena of its own, and a chunk that one thread decodes and another drops leaves
    a hole in the arena that the next thread can't use: a mount with a cache of 256 MiB took 650 MiB. With one
    arena for all it takes 340 MiB, and is a quarter faster, since memory that is in use already needs no page
    faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def keep_memory_private() -> None:
    """Keeps keys and passwords out of core dumps, and out of reach of debuggers in other processes of this
    user."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)

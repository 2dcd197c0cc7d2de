"""nbdkit plugin that counts the states which Python has of nbdkit's threads; for tests/nbd/test_threads.py.

A read returns two numbers of 8 bytes: how many states were made, and how many of these live.
"""

from __future__ import annotations

import struct
import threading
import weakref

import nbdkit

from pbsfs.nbd import threads

API_VERSION = 2
SIZE = 1 << 20


class _State:
    """One in each state of a thread, as long as that lives."""

    def __init__(self) -> None:
        _made.append(weakref.ref(self))


class _Here(threading.local):
    state: _State | None = None


_made: list[weakref.ref[_State]] = []
_here = _Here()


def thread_model() -> int:
    return nbdkit.THREAD_MODEL_PARALLEL


def open(readonly: bool) -> int:  # noqa: A001 - nbdkit's name
    threads.opened()
    return 1


def close(_handle: int) -> None:
    threads.closed()


def get_size(_handle: int) -> int:
    return SIZE


def can_multi_conn(_handle: int) -> bool:
    return True


def pread(_handle: int, buffer: memoryview, offset: int, flags: int) -> None:
    threads.reading()
    if _here.state is None:
        _here.state = _State()
    living = sum(made() is not None for made in _made)
    buffer[:] = struct.pack("<QQ", len(_made), living).ljust(len(buffer), b"\0")

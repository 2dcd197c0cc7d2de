"""nbdkit plugin, in Python, that does next to nothing: what nbdkit's Python plugin can do at most."""

from __future__ import annotations

import nbdkit

API_VERSION = 2

_CONTENT = bytes(64 << 20)


def thread_model() -> int:
    return nbdkit.THREAD_MODEL_PARALLEL


def config(key: str, value: str) -> None:
    pass


def open(readonly: bool) -> int:  # noqa: A001 - nbdkit's name for it
    return 1


def get_size(_handle: int) -> int:
    return 1 << 32


def pread(_handle: int, buffer: memoryview, offset: int, flags: int) -> None:
    buffer[:] = memoryview(_CONTENT)[: len(buffer)]

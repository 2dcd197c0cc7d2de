"""The bytes that reads return: those of chunks, and the zeros of holes.

Used by images and their handles. Pure: may be called from any thread.
"""

from __future__ import annotations

import ctypes

from pbsfs.formats.blob import MAX_CHUNK_SIZE

_ZEROS = memoryview(bytes(MAX_CHUNK_SIZE))  # never written, so it takes no memory

Buffer = bytes | memoryview
"""A chunk's bytes, or, of a hole, what `zeros` returns; or a view of a part of either."""

LARGE_COPY = 64 << 10
"""Bytes from which letting go of Python's lock costs less than holding on to it."""

_LIBC = ctypes.CDLL(None)
_LIBC.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_LIBC.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
_LIBC.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_LIBC.memcpy.restype = _LIBC.memset.restype = None


def zeros(length: int) -> Buffer:
    """`length` zero bytes, at most those of a chunk; all calls share their memory."""
    return _ZEROS[:length]


def is_zero(data: memoryview) -> bool:
    """Whether all bytes of writable memory are zeros. Lets go of Python's lock (GIL) meanwhile."""
    if not data:
        return True
    place = ctypes.addressof(ctypes.c_char.from_buffer(data))
    # All are equal to the first one if each is equal to the next.
    return data[0] == 0 and _LIBC.memcmp(place, place + 1, len(data) - 1) == 0


def is_hole(data: Buffer) -> bool:
    """Whether these are zeros that `zeros` returned, without a look at them."""
    return isinstance(data, memoryview) and data.obj is _ZEROS.obj


def join(parts: list[Buffer]) -> Buffer:
    """The bytes of all `parts` in order; one part is not copied, nor are holes."""
    if len(parts) == 1:
        return parts[0]
    length = sum(map(len, parts))
    if 0 < length <= len(_ZEROS) and all(map(is_hole, parts)):
        return zeros(length)
    return b"".join(parts)


def copy(target: memoryview, at: int, source: Buffer, start: int, length: int) -> None:
    """Copies `length` bytes of `source` from `start` into `target` from `at` on.

    With slices Python's lock (GIL) would be held: 1 ms for 4 MiB of fresh memory, without anything received.
    """
    if length < LARGE_COPY:
        target[at : at + length] = memoryview(source)[start : start + length]
        return
    place = ctypes.addressof(ctypes.c_char.from_buffer(target, at))
    if isinstance(source, bytes):
        origin = ctypes.cast(ctypes.c_char_p(source), ctypes.c_void_p).value or 0
        _LIBC.memcpy(place, origin + start, length)
    elif is_hole(source):
        _LIBC.memset(place, 0, length)
    else:
        raise TypeError("a chunk's bytes are neither bytes nor a view of the zeros of a hole")

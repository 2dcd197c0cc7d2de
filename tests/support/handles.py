"""File handles, as an NFS server uses them: `name_to_handle_at(2)` and `open_by_handle_at(2)`.

Python has neither. Opening by handle takes the right to look into every directory (CAP_DAC_READ_SEARCH).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_MOST_BYTES = 128  # MAX_HANDLE_SZ

_libc = ctypes.CDLL(None, use_errno=True)


class _FileHandle(ctypes.Structure):
    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * _MOST_BYTES),
    )


class FileHandle:
    """What stands for a file in its file system, without its name. Raises OSError. Links are not followed."""

    def __init__(self, path: Path) -> None:
        self._handle = _FileHandle(handle_bytes=_MOST_BYTES)
        mount_id = ctypes.c_int()
        done = _libc.name_to_handle_at(
            -100, os.fsencode(path), ctypes.byref(self._handle), ctypes.byref(mount_id), 0
        )
        if done != 0:
            raise _error(path)

    def open(self, place: Path, flags: int = os.O_RDONLY) -> int:
        """A descriptor of the file, in the file system that is mounted at `place`. Raises OSError."""
        mount = os.open(place, os.O_RDONLY)
        try:
            fd: int = _libc.open_by_handle_at(mount, ctypes.byref(self._handle), flags | os.O_CLOEXEC)
            if fd < 0:
                raise _error(place)
            return fd
        finally:
            os.close(mount)


def drop_caches() -> None:
    """Makes the kernel forget all names and inodes that nobody holds. Takes root."""
    Path("/proc/sys/vm/drop_caches").write_text("2")


def _error(path: Path) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), str(path))

"""Locks on the files that copies write, so that two programs don't write to one.

They are those of an open file description (F_OFD_SETLK, fcntl(2)): they end when the file is closed, collide
with other locks of POSIX, and on NFS too with those of other machines. QEMU locks bytes from the hundredth on
(block/file-posix.c), so a lock on a whole file collides with it, and one on its first byte does not.
Synchronous.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct


def lock(fd: int, *, shared: bool = False, only_start: bool = False) -> bool:
    """Locks an open file; False if another program holds a lock that collides.

    `shared`: only against those that write. `fd` has to be open for writing otherwise. `only_start`: the
    first byte instead of all. A file system without locks grants all.
    """
    kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
    span = struct.pack("@hhqqi", kind, os.SEEK_SET, 0, 1 if only_start else 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, span)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True

"""Locks on the files that copies write, so that two programs don't write to one.

They are those of an open file description (F_OFD_SETLK, fcntl(2)): they end when the file is closed, collide
with those of QEMU and with other locks of POSIX, and on NFS too with those of other machines. Synchronous.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct


def lock(fd: int, *, shared: bool = False) -> bool:
    """Locks all of an open file; False if another program holds a lock that collides.

    `shared`: only against those that write. `fd` has to be open for writing otherwise. A file system without
    locks grants all.
    """
    kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
    whole_file = struct.pack("@hhqqi", kind, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, whole_file)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True

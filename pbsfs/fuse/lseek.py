"""SEEK_DATA and SEEK_HOLE for pyfuse3, which has no handler for them.

The extension `_lseek` (see `lseek_build.py`) defines a function of libfuse that pyfuse3 calls. The
dynamic linker lets the extension's definition win if the extension is loaded into the global scope
before pyfuse3 is. So the rule for importers: **import this module before pyfuse3**. It raises
`ImportError` when it comes too late, because seeking would then silently find no holes.

Only `pbsfs.fuse` uses it. The handler is one per process, like pyfuse3's own session.
"""

import errno
import logging
import os
import sys
from collections.abc import Callable

if "pyfuse3" in sys.modules:
    raise ImportError(
        "pbsfs.fuse.lseek must be imported before pyfuse3: "
        "once pyfuse3 is loaded, its seek operation can no longer be supplied"
    )

_flags = sys.getdlopenflags()
sys.setdlopenflags(_flags | os.RTLD_GLOBAL)
try:
    from pbsfs.fuse._lseek import ffi, lib
finally:
    sys.setdlopenflags(_flags)

__all__ = ["install"]

logger = logging.getLogger(__name__)

# What a FUSE reply can carry. The kernel rejects a reply beyond either, and the caller would hang.
_MAX_ERRNO = 511
_MAX_OFFSET = 2**63 - 1

_handler: Callable[[int, int, int, int], int] | None = None


def install(handler: Callable[[int, int, int, int], int]) -> None:
    """Let `handler(inode, offset, whence, fh)` answer seeks on mounts that are made from now on.

    Call it before `pyfuse3.init`. The handler returns an offset, or raises `OSError` with the errno
    that the caller is to see (`ENXIO` beyond the end); any other exception is logged, and is `EIO`
    to the caller. `whence` is `os.SEEK_DATA` or `os.SEEK_HOLE`: the kernel does the rest itself.

    The handler runs in the thread and in the task that read the request from the kernel, with the
    session's other requests waiting: it must neither block nor await, so what it answers from has
    to be in memory since the file was opened.
    """
    global _handler  # noqa: PLW0603 - the extension calls one function, bound when it was loaded
    _handler = handler
    lib.pbsfs_lseek_enable()


@ffi.def_extern(name="pbsfs_lseek", error=-errno.EIO)
def _answer(inode: int, offset: int, whence: int, fh: int) -> int:
    """What C calls: the offset, or the negative errno. Nothing may be raised from here."""
    try:
        assert _handler is not None, "called before install()"
        found = _handler(inode, offset, whence, fh)
        if not 0 <= found <= _MAX_OFFSET:
            raise ValueError(f"the handler answered {found}")
    except OSError as error:
        if error.errno is not None and 0 < error.errno <= _MAX_ERRNO:
            return -error.errno
        logger.exception("seek in inode %d failed without a usable errno", inode)
        return -errno.EIO
    except Exception:
        logger.exception("seek in inode %d failed", inode)
        return -errno.EIO
    return found

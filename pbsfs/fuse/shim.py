"""What pyfuse3 lacks: SEEK_DATA and SEEK_HOLE, interrupted requests, and answers without a task.

The extension `_shim` (see `shim_build.py`) defines functions of libfuse that pyfuse3 calls. The
dynamic linker lets the extension's definitions win if the extension is loaded into the global scope
before pyfuse3 is. So the rule for importers: **import this module before pyfuse3**. It raises
`ImportError` if pyfuse3 is already loaded, because seeking would then silently find no holes, and waiting
programs could not be killed. It raises MountError if the extension or the libfuse that it is linked with
is missing.

Only `pbsfs.fuse` uses it. The handlers are one object per process, like pyfuse3's own session.
"""

import errno
import logging
import os
import select
import sys
from collections.abc import Callable, Iterable
from signal import SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM
from typing import Any, NamedTuple, Protocol

from pbsfs.base.errors import MountError
from pbsfs.formats.blob import MAX_CHUNK_SIZE
from pbsfs.reader.buffers import zeros

if "pyfuse3" in sys.modules:
    raise ImportError(
        "pbsfs.fuse.shim must be imported before pyfuse3: "
        "once pyfuse3 is loaded, what it lacks can no longer be supplied"
    )

_flags = sys.getdlopenflags()
sys.setdlopenflags(_flags | os.RTLD_GLOBAL)
try:
    from pbsfs.fuse._shim import ffi, lib
except ImportError as error:
    raise MountError(
        f"cannot load libfuse 3: {error}; apt install fuse3, or, if pbsfs was built on another system, "
        "install it again"
    ) from None
finally:
    sys.setdlopenflags(_flags)

__all__ = [
    "AtOnce",
    "Attributes",
    "Request",
    "check_libfuse",
    "drop_pages",
    "install",
    "is_connected",
    "last_request",
    "session_fd",
]

logger = logging.getLogger(__name__)

# What a FUSE reply can carry. The kernel rejects a reply beyond either, and the caller would hang.
_MAX_ERRNO = 511
_MAX_OFFSET = 2**63 - 1

_REINSTALL = "build pyfuse3 on this system: pip install --force-reinstall --no-binary pyfuse3 pyfuse3"

# What reads of holes are answered from.
_HOLES = ffi.from_buffer(zeros(MAX_CHUNK_SIZE))

_handlers: "AtOnce | None" = None
_waiting: "dict[int, Request]" = {}

# Signals that end a program. Others (a child's end, a changed window) interrupt the wait too, but most
# programs don't expect a read of a file to fail for them.
_ENDING = sum(1 << (number - 1) for number in (SIGHUP, SIGINT, SIGQUIT, SIGKILL, SIGTERM))


class Attributes(NamedTuple):
    """What the kernel gets of an inode.

    `size`: bytes; `blocks`: of 512 bytes. `mtime_ns`: all of its times, since 1970. `entry_lasts`, `lasts`:
    seconds for which the kernel may keep the name, and the rest.
    """

    inode: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    block_size: int
    blocks: int
    mtime_ns: int
    entry_lasts: float
    lasts: float


class AtOnce(Protocol):
    """Handlers that answer from what is in memory.

    They run in the thread and in the task that read the request from the kernel, with the session's other
    requests waiting: they must neither block nor await, nor do work that grows with its input. But for
    `seek`, where one can't answer, or raises, pyfuse3's handler of the same operation gets the request: so it
    must not have changed anything, and need not report the error.
    """

    def seek(self, inode: int, offset: int, whence: int, fh: int) -> int:
        """An offset. Raises `OSError` with the errno for the caller (`ENXIO` beyond the end); any other
        exception is logged, and the caller gets `EIO`. `whence` is `os.SEEK_DATA` or `os.SEEK_HOLE`: the
        kernel handles the others."""

    def lookup_at_once(self, parent: int, name: bytes) -> Attributes | None:
        """The entry called `name`, which counts as looked up."""

    def forget_at_once(self, inode: int) -> None:
        """Takes back a look-up, of which the kernel did not take the answer."""

    def getattr_at_once(self, inode: int) -> Attributes | None:
        """The attributes of `inode`."""

    def open_at_once(self, inode: int, flags: int) -> tuple[int, bool] | None:
        """A new handle, and whether the kernel may keep the pages that it has of the file."""

    def read_at_once(self, fh: int, offset: int, size: int) -> bytes | memoryview | None:
        """The bytes, at most `size`."""

    def release_at_once(self, fh: int) -> None:
        """Closes the handle."""

    def lacks_xattr(self, inode: int, name: bytes) -> bool:
        """Whether it is known that there is no extended attribute of that name."""


def install(handlers: AtOnce) -> None:
    """Let `handlers` answer on mounts that are made from now on. Call it before `pyfuse3.init`."""
    global _handlers  # noqa: PLW0603 - the extension calls functions that were bound when it was loaded
    _handlers = handlers
    lib.pbsfs_shim_enable(_HOLES, len(_HOLES))


@ffi.def_extern(name="pbsfs_lseek", error=-errno.EIO)
def _answer(inode: int, offset: int, whence: int, fh: int) -> int:
    """What C calls: the offset, or the negative errno. Nothing may be raised from here."""
    try:
        assert _handlers is not None, "called before install()"
        found = _handlers.seek(inode, offset, whence, fh)
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


# What C calls first. An exception is not reported here: pyfuse3's handler meets the same error.


@ffi.def_extern(name="pbsfs_lookup", error=0)
def _lookup(parent: int, name: Any, into: Any) -> int:
    try:
        return _give(_handlers.lookup_at_once(parent, ffi.string(name)), into)  # type: ignore[union-attr]
    except Exception:
        return 0


@ffi.def_extern(name="pbsfs_forget")
def _forget(inode: int) -> None:
    try:
        _handlers.forget_at_once(inode)  # type: ignore[union-attr]
    except Exception:
        logger.exception("inode %d was not forgotten", inode)


@ffi.def_extern(name="pbsfs_getattr", error=0)
def _getattr(inode: int, into: Any) -> int:
    try:
        return _give(_handlers.getattr_at_once(inode), into)  # type: ignore[union-attr]
    except Exception:
        return 0


def _give(found: Attributes | None, into: Any) -> int:
    """Fills the structure of C, and returns whether there was something to fill it with."""
    if found is None:
        return 0
    into.inode, into.mode, into.nlink, into.uid, into.gid, into.rdev = found[:6]
    into.size, into.block_size, into.blocks = found[6:9]
    into.seconds, into.nanoseconds = divmod(found.mtime_ns, 1_000_000_000)
    into.entry_lasts, into.lasts = found[10:]
    return 1


@ffi.def_extern(name="pbsfs_open", error=-1)
def _open(inode: int, flags: int, fh: Any) -> int:
    try:
        answer = _handlers.open_at_once(inode, flags)  # type: ignore[union-attr]
    except Exception:
        return -1
    if answer is None:
        return -1
    fh[0], keep_cache = answer
    return keep_cache


@ffi.def_extern(name="pbsfs_read", error=0)
def _read(request: int, fh: int, offset: int, size: int) -> int:
    try:
        data = _handlers.read_at_once(fh, offset, size)  # type: ignore[union-attr]
        if data is None:
            return 0
        view = ffi.from_buffer(data)
    except Exception:
        return 0
    lib.pbsfs_reply(request, view, len(view))  # fails only if the mount has ended: then nobody waits
    return 1


@ffi.def_extern(name="pbsfs_release", error=0)
def _release(fh: int) -> int:
    try:
        _handlers.release_at_once(fh)  # type: ignore[union-attr]
    except Exception:
        return 0
    return 1


@ffi.def_extern(name="pbsfs_lacks_xattr", error=0)
def _lacks_xattr(inode: int, name: Any) -> int:
    try:
        return _handlers.lacks_xattr(inode, ffi.string(name))  # type: ignore[union-attr]
    except Exception:
        return 0


class Request:
    """A request that is being handled, for as long as `with` lasts: `is_handled`.

    Calls `on_signal` when the program that waits for the answer gets its first signal. The kernel reports no
    further one, and after the first it lets not even SIGKILL end the program before the answer (Linux:
    fs/fuse/dev.c, request_wait_answer). So the handler has to look at `is_given_up` from then on, and to
    answer with EINTR once that is true.
    """

    __slots__ = ("_id", "_on_signal", "is_handled")

    def __init__(self, request: int, on_signal: Callable[["Request"], None]) -> None:
        """`request`: what `last_request` returned at the start of the handler."""
        self._id = request
        self._on_signal = on_signal
        self.is_handled = False

    def __enter__(self) -> None:
        if self._id:
            self.is_handled = True
            _waiting[self._id] = self
            if lib.pbsfs_is_interrupted(self._id):
                self.signalled()

    def __exit__(self, *_error: object) -> None:
        self.is_handled = False
        _waiting.pop(self._id, None)

    def signalled(self) -> None:
        """The program got a signal."""
        self._on_signal(self)

    def is_given_up(self) -> bool:
        """Whether the program that waits is to end. Call it while the request is handled."""
        return _is_ending(lib.pbsfs_caller(self._id))


def last_request() -> int:
    """The request that a handler got last; 0 without a mount.

    Call it before the handler first waits, and only in handlers of operations that are wrapped: for others it
    is some earlier request, which may not exist any more.
    """
    return lib.pbsfs_request()


def session_fd() -> int:
    """The descriptor of the connection to the kernel, between `pyfuse3.init` and `pyfuse3.close`.

    Raises RuntimeError if the extension made no session.
    """
    fd = lib.pbsfs_session_fd()
    if fd < 0:
        raise RuntimeError(f"pyfuse3 did not call the extension of pbsfs; {_REINSTALL}")
    return fd


def is_connected() -> bool:
    """Whether the kernel uses the connection: False when it was unmounted or aborted, or was never made."""
    fd = lib.pbsfs_session_fd()
    if fd < 0:
        return False
    ended = select.poll()
    ended.register(fd, 0)  # errors are always reported
    return not ended.poll(0)


def drop_pages(inode: int, offset: int, length: int) -> None:
    """Has the kernel drop what it keeps of `length` bytes of a file from `offset` on.

    Call it in a thread other than the trio loop's: the kernel waits for the answers to reads of that range.
    Raises OSError: ENOENT where the kernel does not know the inode any more.
    """
    error = -lib.pbsfs_drop_pages(inode, offset, length)
    if error:
        raise OSError(error, os.strerror(error))


def check_libfuse() -> None:
    """Checks that pyfuse3 and the extension use the same libfuse: one can't use the sessions of another.

    Call it before `pyfuse3.init`. Raises RuntimeError.
    """
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        found = _libfuses(maps)
    if len(found) > 1:
        raise RuntimeError(f"pyfuse3 and pbsfs use different libraries: {', '.join(found)}; {_REINSTALL}")


def _libfuses(maps: Iterable[str]) -> list[str]:
    """The files of libfuse 3 among the lines of /proc/PID/maps (proc(5)): the path is the sixth field."""
    paths = {line.split(maxsplit=5)[5].strip() for line in maps if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if path.rpartition("/")[2].startswith("libfuse3"))


def _is_ending(caller: int) -> bool:
    """Whether the thread `caller` has a signal pending that is meant to end it."""
    try:
        with open(f"/proc/{caller}/status", encoding="ascii", errors="replace") as status:
            fields = dict(line.split(":", 1) for line in status if ":" in line)
        pending = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
    except (OSError, ValueError, KeyError):
        return True  # it has ended, or is in another PID namespace: better an error than a hang
    return bool(pending & _ENDING)


@ffi.def_extern(name="pbsfs_interrupted")
def _interrupted(request: int) -> None:
    """What C calls. `Request` notices a signal that came before its handler started."""
    waiting = _waiting.get(request)
    if waiting is not None:
        try:
            waiting.signalled()
        except Exception:
            logger.exception("request %d: its interrupt was not handled", request)

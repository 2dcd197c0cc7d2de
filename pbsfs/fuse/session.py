"""libfuse's session with the kernel: a mount from mounting to unmounting.

There is one in a process, as pyfuse3 has it. Used by `pbsfs.fuse.mount`; synchronous.
"""

from __future__ import annotations

import pbsfs.fuse.shim  # before pyfuse3, see there

import logging
import os
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

import pyfuse3

from pbsfs.base.errors import MountError
from pbsfs.fuse.mountpoint import Mount, abort, is_dead, mounted_at, unmount
from pbsfs.fuse.notices import Notices

log = logging.getLogger(__name__)

NOTICE_PATIENCE = 1.0
"""Seconds, twice, that the end of a mount waits for calls that have the kernel drop pages and names."""


@contextmanager
def mounted(
    operations: pyfuse3.Operations,
    notices: Notices,
    mountpoint: Path,
    flags: Set[str],
    name: str,
    *,
    connection: int | None = None,
) -> Iterator[None]:
    """A mount of `operations`, which ends with the context.

    `notices`: the calls that it makes. `name`: of the source, in the mount table. `flags`: options for the
    kernel and libfuse, besides those that every mount has. `connection`: the descriptor of a mount that
    another process has attached at `mountpoint`, and will unmount; None to mount there. Raises MountError.
    """
    flags = {
        *flags,
        "ro",
        "nosuid",
        "nodev",
        "default_permissions",
        "subtype=pbsfs",
        f"fsname={_escaped(name)}",
    }
    said: list[str] = []
    # Libfuse takes such a path for a descriptor: it neither mounts nor unmounts.
    place = str(mountpoint) if connection is None else f"/dev/fd/{connection}"
    try:
        pbsfs.fuse.shim.check_libfuse()
        with _standard_error_in(said):
            pyfuse3.init(operations, place, flags)
    except RuntimeError as error:
        reason = said[-1] if said else str(error)
        raise MountError(f"cannot mount on {mountpoint}: {reason}") from None
    for line in said:
        log.warning("%s: %s", mountpoint, line)
    mount = mounted_at(mountpoint)
    try:
        try:
            pbsfs.fuse.shim.session_fd()
        except RuntimeError as error:
            raise MountError(f"cannot mount on {mountpoint}: {error}") from None
        yield
    finally:
        end(notices, mount, attached=connection is not None)


def end(notices: Notices, mount: Mount | None, *, attached: bool = False) -> None:
    """Closes the session, and unmounts. `mount`: as the mount table has it; None if it is not there.

    `attached`: another process unmounts.
    """
    was_connected = pbsfs.fuse.shim.is_connected()
    # The kernel reuses the number of a connection that has ended: it may be that of another mount by now.
    if not notices.end(NOTICE_PATIENCE) and mount is not None and pbsfs.fuse.shim.is_connected():
        abort(mount)  # nobody answers the reads any more that the kernel waits for
    if notices.end(NOTICE_PATIENCE):
        pyfuse3.close(unmount=True)
    # libfuse leaves the mount if its connection was aborted; and if not all calls ended, so does pbsfs.
    if mount is None or attached or mounted_at(mount.path) != mount:
        return
    if was_connected or is_dead(mount.path):  # else it was unmounted, and this is the next mount there
        try:
            unmount(mount.path, lazy=True)
        except MountError as error:
            if mounted_at(mount.path) == mount:  # else another process unmounted it first
                log.warning("%s", error)


@contextmanager
def _standard_error_in(said: list[str]) -> Iterator[None]:
    """Appends to `said` the lines that are written to standard error in the meantime.

    Libfuse and fusermount3 report errors only there. In memory: there may be no writable directory.
    """
    with open(os.memfd_create("standard-error"), "w+b") as messages:
        kept = os.dup(2)
        os.dup2(messages.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            messages.seek(0)
            said += messages.read().decode(errors="replace").strip().splitlines()


def _escaped(name: str) -> str:
    """A name for the mount table in libfuse's options: ASCII only, and commas escaped."""
    text = name.encode("ascii", "replace").decode()
    return text.replace("\\", "\\\\").replace(",", "\\,")

"""A mount for another process to serve: one attaches it with privileges, the other one needs none.

A service may thus be closed as one that mounts nothing: a mount that it makes in a mount namespace of its
own is not visible outside. The privileged process attaches, leaves the connection to the kernel with the
service manager, and ends; programs that use the mount wait until the other process serves it.

Synchronous; called by `pbsfs mount`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Set as AbstractSet
from pathlib import Path

from pbsfs.base.errors import MountError

CONNECTION = "mount"
"""The name of the connection at the service manager."""

_DEVICE = "/dev/fuse"
_ALWAYS = ("ro", "nosuid", "nodev", "default_permissions", "subtype=pbsfs", "rootmode=40000")


def attach(place: Path, name: str, flags: AbstractSet[str], *, uid: int, gid: int) -> int:
    """Mounts at `place`, for the process of the user `uid` and its group `gid` to serve.

    `name`: the source's, in the mount table. `flags`: options as `FuseOptions` has them. Returns the
    connection's descriptor (Linux: Documentation/filesystems/fuse.rst, the options of a mount). Raises
    MountError.
    """
    shared = {"allow_other", "allow_root"}
    options = [*_ALWAYS, f"user_id={uid}", f"group_id={gid}", *sorted(flags - shared)]
    options += ["allow_other"] if flags & shared else []
    try:
        fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(
            f"cannot mount on {place}: {_DEVICE}: {error.strerror}; load its module with: modprobe fuse"
        ) from None
    options.append(f"fd={fd}")
    command = ["mount", "--internal-only", "--no-canonicalize", "-t", "fuse", "-o", ",".join(options)]
    done = subprocess.run(
        [*command, "--", name, str(place)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        pass_fds=[fd],
    )
    if done.returncode != 0:
        os.close(fd)
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise MountError(f"cannot mount on {place}: {reason}")
    return fd

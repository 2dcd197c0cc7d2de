"""Mount points: what is mounted where, whether a place may be mounted on, and unmounting.

Synchronous; called before a mount starts, and by the commands `umount`, `status` and `stats`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pbsfs.base.errors import MountError
from pbsfs.base.text import first_of

FS_TYPE = "fuse.pbsfs"

DEAD = (errno.ENOTCONN, errno.ECONNABORTED)
"""The errnos of a mount whose process has ended."""

_CONNECTIONS = Path("/sys/fs/fuse/connections")
MOUNTINFO = Path("/proc/self/mountinfo")
_OWNER = re.compile(rb"(?:^|,)user_id=(\d+)(?:,|$)")
_ESCAPED = re.compile(rb"\\([0-7]{3})")

WATCH_NAME, STATS_NAME = ".pbsfs", "stats"
"""A directory at the root of each mount, and its file with what the mount did."""

ANSWER_PATIENCE = 5.0
"""Seconds that `states` waits for mounts to answer."""

ANSWERS, DEAD_STATE, SILENT_STATE = "answers", "its process has died", "does not answer"

ADVICE = {
    DEAD_STATE: "clear it with: pbsfs umount PLACE",
    SILENT_STATE: "end it with: pbsfs umount --lazy PLACE",
}
"""What to do about a mount in such a state."""

UNMOUNT_PATIENCE = 10.0
"""Seconds that `unmount` waits for a mount to be gone from the table."""


class Mount(NamedTuple):
    """A line of the mount table. `device`: major:minor. `root`: the part of the file system that it shows.

    `source`: its name. `owner`: for a FUSE mount, the user who made it, as the kernel reports it; None for
    others.
    """

    device: str
    root: Path
    path: Path
    type: str
    source: str
    owner: int | None


def mounts() -> Iterator[Mount]:
    """The mount table of this process, oldest first (format: proc(5))."""
    for line in MOUNTINFO.read_bytes().splitlines():
        fields = line.split(b" ")
        behind = fields[fields.index(b"-", 6) + 1 :]
        root, path = (Path(_unescaped(field)) for field in fields[3:5])
        owner = _OWNER.search(behind[2])
        uid = None if owner is None else int(owner[1])
        yield Mount(fields[2].decode(), root, path, os.fsdecode(behind[0]), _unescaped(behind[1]), uid)


def _unescaped(field: bytes) -> str:
    return os.fsdecode(_ESCAPED.sub(lambda match: bytes([int(match[1], 8)]), field))


def states(places: Sequence[Path]) -> list[str]:
    """Whether each mount answers, in words. Asks all at once, in threads that a silent mount keeps."""
    found = dict.fromkeys(places, SILENT_STATE)

    def ask(place: Path) -> None:
        try:
            os.stat(place)
            found[place] = ANSWERS
        except PermissionError:
            found[place] = "open to its user only"
        except OSError as error:
            found[place] = DEAD_STATE if error.errno in DEAD else str(error.strerror)

    asking = []
    for place in places:
        thread = threading.Thread(target=ask, args=(place,), daemon=True)
        try:
            thread.start()
            asking.append(thread)
        except RuntimeError as error:  # the system has no more of them
            found[place] = f"not asked: {error}"
    limit = time.monotonic() + ANSWER_PATIENCE
    for thread in asking:
        thread.join(max(0.0, limit - time.monotonic()))
    return [found[place] for place in places]


def mounted_at(path: Path) -> Mount | None:
    """The mount at the absolute path `path`: the top one if there are several."""
    return next((mount for mount in reversed(list(mounts())) if mount.path == path), None)


def is_dead(path: Path) -> bool:
    """Whether the mount at `path` has lost its process or connection. Waits for the answer of any other."""
    try:
        os.statvfs(path)  # the kernel keeps no answer to this
    except OSError as error:
        return error.errno in DEAD
    return False


def is_automount(path: Path) -> bool:
    """Whether `path` is an automount that waits for its mount.

    Programs that use the path wait too, unless they are in the process group of the automount's daemon
    (Linux: Documentation/filesystems/autofs.rst), in which systemd runs mount(8).
    """
    mount = mounted_at(path)
    return mount is not None and mount.type == "autofs"


def mount_of(path: Path) -> Mount | None:
    """The mount in which the absolute path `path`, without symbolic links, lies."""
    table = {mount.path: mount for mount in mounts()}  # of several at one place the last is on top
    return next((table[parent] for parent in (path, *path.parents) if parent in table), None)


def resolve(path: Path) -> Path:
    """The absolute path of `path`, without access to what is mounted there: its process may be dead."""
    absolute = Path(os.path.abspath(path))
    return absolute.parent.resolve() / absolute.name if absolute.name else absolute


def check_usable(path: Path, *, datastore: Path | None, nonempty: bool) -> Path:
    """The absolute path of a mount point that may be used; raises MountError with the reason if not.

    `datastore`: the directory that pbsfs reads, if any: a mount inside or above it would hide data.
    """
    place = resolve(path)
    try:
        found = os.stat(place)
    except OSError as error:
        if error.errno in DEAD:
            raise MountError(
                f"{place}: a mount of a process that has died is left here; "
                f"clear it with: pbsfs umount {place}   (or: {_umount_command(place)})"
            ) from None
        hint = "; make it with mkdir" if error.errno == errno.ENOENT else ""
        raise MountError(f"mount point {place}: {error.strerror}{hint}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise MountError(f"mount point {place} is not a directory; name an empty one")
    place = place.resolve()
    mount = mounted_at(place)
    triggered = is_automount(place)
    if mount is not None and not triggered and (mount.type == FS_TYPE or not nonempty):
        raise MountError(
            f"{place} is already mounted (type {mount.type}); unmount it, or use another directory"
        )
    if datastore is not None:
        _check_apart(place, datastore.resolve())
    if triggered:
        return place
    try:
        with os.scandir(place) as entries:
            empty = not any(entries)
    except OSError as error:
        raise MountError(f"mount point {place}: {error.strerror}") from None
    if not empty and not nonempty:
        raise MountError(
            f"mount point {place} is not empty; use an empty directory, or -o nonempty to cover it"
        )
    return place


def _check_apart(place: Path, datastore: Path) -> None:
    """Follows bind mounts and links, so that they can't hide that one is inside the other."""
    for inner, outer, text in (
        (place, datastore, "is inside the datastore"),
        (datastore, place, "contains the datastore"),
    ):
        if _is_within(inner, outer):
            raise MountError(f"mount point {place} {text} {datastore}; use a directory outside of it")


def _is_within(inner: Path, outer: Path) -> bool:
    identity = _identity(outer)
    if any(_identity(parent) == identity for parent in (inner, *inner.parents)):
        return True
    # A bind mount of a part of `outer` has no parent that is `outer`, but the same place on disk.
    (inner_device, inner_place), (outer_device, outer_place) = _location(inner), _location(outer)
    return inner_device == outer_device and inner_place.is_relative_to(outer_place)


def _location(path: Path) -> tuple[str, Path]:
    """The file system's device, and the path within it, for whichever mount shows it."""
    mount = mount_of(path)
    return (mount.device, mount.root / path.relative_to(mount.path)) if mount else ("", path)


def _identity(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _umount_command(place: Path) -> str:
    return f"umount {place}" if os.geteuid() == 0 else f"fusermount3 -u {place}"


def _ours() -> str:
    """Which mounts `unmount` would end."""
    names = first_of(str(mount.path) for mount in mounts() if mount.type == FS_TYPE)
    return f"name a mount point of pbsfs: {names}" if names else "there is no pbsfs mount here"


def mount_of_ours(path: Path) -> Mount:
    """The pbsfs mount at `path`, which need not answer. Raises MountError where there is none."""
    place = resolve(path)
    mount = mounted_at(place) or mounted_at(place.parent / os.path.realpath(place))
    if mount is None:
        problem = "is not mounted" if os.path.lexists(place) else "does not exist"
        raise MountError(f"{place} {problem}; {_ours()}")
    if mount.type != FS_TYPE:
        raise MountError(f"{place} is not a pbsfs mount (type {mount.type}); {_ours()}")
    return mount


def abort(mount: Mount) -> None:
    """Ends the connection of a FUSE mount: all that waits for its process fails.

    Linux: Documentation/filesystems/fuse/fuse.rst, "Control filesystem". Does nothing if the user may not.
    """
    number = mount.device.partition(":")[2]
    with suppress(OSError):
        (_CONNECTIONS / number / "abort").write_text("1")


def unmount(path: Path, *, lazy: bool = False) -> None:
    """Unmounts a pbsfs mount, even if its process is dead. Raises MountError.

    `lazy`: detach it now; it ends when the last open file is closed.
    """
    mount = mount_of_ours(path)
    fusermount = shutil.which("fusermount3") or shutil.which("fusermount")
    if os.geteuid() == 0:
        command = ["umount", *(["-l"] if lazy else []), "--", str(mount.path)]
    elif fusermount:
        command = [fusermount, "-u", *(["-z"] if lazy else []), "--", str(mount.path)]
    else:
        raise MountError("fusermount3 was not found; install the package fuse3")
    before = sum(other.path == mount.path for other in mounts())
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].rstrip(".")
        busy = "; close what is open there, or use --lazy" if "busy" in reason else ""
        raise MountError(f"cannot unmount {mount.path}: {reason}{busy}")
    limit = time.monotonic() + UNMOUNT_PATIENCE
    while sum(other.path == mount.path for other in mounts()) >= before:
        if time.monotonic() > limit:
            raise MountError(
                f"{mount.path} is still mounted; detach it with: pbsfs umount --lazy {mount.path}"
            )
        time.sleep(0.01)

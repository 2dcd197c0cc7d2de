"""What a test needs of the machine: skipped where it is missing, but under CI that is a failure."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest


def need(*tools: str) -> None:
    """Programs that have to be on PATH."""
    for tool in tools:
        if shutil.which(tool) is None:
            _missing(f"{tool} is not installed")


def need_root(why: str) -> None:
    if os.geteuid() != 0:
        _missing(f"only root can {why}")


def need_another_user() -> None:
    """The right to become another user, who can run what is in this checkout: not below /root, say."""
    need_root("become another user")
    closed = [path for path in Path(__file__).resolve().parents if not path.stat().st_mode & 0o001]
    if closed:
        _missing(f"other users can't enter {closed[-1]}, where the checkout is")


def need_fuse() -> None:
    """The right to mount FUSE file systems."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        _missing(f"/dev/fuse: {error.strerror}")
    if os.geteuid() != 0:
        need("fusermount3")


def need_fuse_control() -> None:
    """The files by which a FUSE connection is aborted, which a chroot or container may lack."""
    need_fuse()
    if not os.path.ismount("/sys/fs/fuse/connections"):
        _missing("nothing is mounted at /sys/fs/fuse/connections (mount -t fusectl none …)")


def need_autofs() -> None:
    """The kernel's automounts, and the right to make them."""
    need_root("make automounts")
    if "autofs" not in Path("/proc/filesystems").read_text().split():
        _missing("this kernel has no autofs")


def need_loop() -> None:
    """Loop devices, and the right to mount them."""
    need_root("set up loop devices")
    need("losetup", "mount", "umount")
    if not os.path.exists("/dev/loop-control"):
        _missing("there is no /dev/loop-control")


def _missing(what: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"CI has to have this: {what}")
    pytest.skip(what)

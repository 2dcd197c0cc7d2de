"""The disk that the machine starts from: Debian with all that the checks use, but without pbsfs.

`debootstrap` makes it once for each release and recipe; it stays in the cache. Synchronous.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

RELEASES = {"12": "bookworm", "13": "trixie"}
"""The releases of Debian that have a package, by the end of its version."""

# The cloud kernel has the modules that are checked (nbd, nfsd, dm, md, loop), and few others.
PACKAGES = (
    *("linux-image-cloud-amd64", "systemd", "systemd-sysv", "udev", "kmod", "dbus", "iproute2"),
    *("python3", "fuse3", "ca-certificates", "e2fsprogs", "xfsprogs", "fdisk", "util-linux"),
    *("nbdkit", "nbdkit-plugin-python", "libnbd-bin", "nbd-client", "qemu-utils"),
    *("dmsetup", "lvm2", "mdadm", "thin-provisioning-tools", "nfs-kernel-server", "nfs-common"),
)

SIZE = "4G"
"""Of the disk, which is sparse."""

FILES = {
    "etc/fstab": "LABEL=root / ext4 defaults 0 1\nLABEL=payload /payload ext4 ro 0 0\n",
    "etc/hostname": "machine\n",
    "etc/hosts": "127.0.0.1 localhost machine\n::1 localhost\n",
    # The addresses of QEMU's user network.
    "etc/systemd/network/10-qemu.network": (
        "[Match]\nType=ether\n\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\n"
    ),
    "etc/systemd/system/checks.service": (
        "[Unit]\nDescription=Checks of pbsfs\nRequiresMountsFor=/payload\n\n"
        "[Service]\nExecStart=/bin/bash /payload/run\n\n"
        "[Install]\nWantedBy=multi-user.target\n"
    ),
    # Emulated processors are slow: what is started may take its time.
    "etc/systemd/system.conf.d/slow.conf": "[Manager]\nDefaultDeviceTimeoutSec=300s\n",
}

ENABLED = ("systemd-networkd.service", "systemd-networkd-wait-online.service", "checks.service")
DISABLED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer"),
    *("e2scrub_all.timer", "e2scrub_reap.service"),
)


@dataclass(frozen=True, slots=True)
class Base:
    """A directory in the cache with the disk, and the kernel that boots it."""

    path: Path

    @property
    def disk(self) -> Path:
        return self.path / "root.img"

    @property
    def kernel(self) -> Path:
        return self.path / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.path / "initrd.img"


class MachineError(Exception):
    """The machine can't be made or started; the text says why."""


def release_of(package: Path) -> str:
    """The code name of the release that a package of pbsfs was built for. Raises MachineError."""
    version = output_of("dpkg-deb", "--field", package, "Version").strip()
    found = re.search(r"\+deb(\d+)$", version)
    if found is None or found[1] not in RELEASES:
        raise MachineError(f"{package}: version {version} is not for Debian 12 or 13; build it there")
    return RELEASES[found[1]]


def base_of(release: str, cache: Path) -> Base:
    """The base of a release, from the cache or new. Raises MachineError."""
    recipe = repr((PACKAGES, SIZE, FILES, ENABLED, DISABLED, inspect.getsource(_make)))
    base = Base(cache / f"{release}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}")
    if base.path.exists():
        return base
    if os.geteuid() != 0:
        raise MachineError(f"{base.path} does not exist, and only root can make it (debootstrap)")
    print(f"machine: making {base.path} with debootstrap, which takes some minutes", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="new-", dir=cache) as work:
        new = Base(Path(work) / "base")
        new.path.mkdir()
        _make(release, Path(work) / "root", new)
        new.path.rename(base.path)
    for old in cache.glob(f"{release}-*"):
        if old != base.path:
            shutil.rmtree(old)
    return base


def _make(release: str, root: Path, base: Base) -> None:
    include = f"--include={','.join(PACKAGES)}"
    output_of("debootstrap", "--variant=minbase", include, release, root)
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    (root / "payload").mkdir()
    (root / "etc/machine-id").write_text("")
    output_of("systemctl", f"--root={root}", "enable", *ENABLED)
    output_of("systemctl", f"--root={root}", "mask", *DISABLED)
    for folder in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"):
        shutil.rmtree(root / folder)
        (root / folder).mkdir()
    for name, target in (("vmlinuz", base.kernel), ("initrd.img", base.initrd)):
        (found,) = (root / "boot").glob(f"{name}-*")
        shutil.copy(found, target)
    output_of("mke2fs", "-q", "-t", "ext4", "-L", "root", "-d", root, base.disk, SIZE)


def output_of(*command: str | Path) -> str:
    """Raises MachineError with the last lines of what the command printed."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MachineError(f"{command[0]} is not installed") from None
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-10:])
        raise MachineError(f"{command[0]} ended with status {done.returncode}:\n{last}")
    return done.stdout

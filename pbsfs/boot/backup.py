"""What is booted: a snapshot or one of its images, as a machine with disks.

Used by `pbsfs boot`, in the loop.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from pbsfs.base.errors import NotFoundError, UsageError
from pbsfs.base.text import first_of
from pbsfs.boot import machine as machines
from pbsfs.boot.machine import Machine
from pbsfs.tree import BlobFile, Directory, ImageFile, SnapshotDirectory, Tree


@dataclass(frozen=True, slots=True)
class Backup:
    """A machine in a backup. `snapshot`: the snapshot's path in the tree, without links."""

    snapshot: str
    machine: Machine


async def find_backup(tree: Tree, path: str) -> Backup:
    """The machine at `path`: of a snapshot with all its disks, of an image with that disk only.

    Raises UsageError, NotFoundError, and what opening an image raises, as KeyRequiredError.
    """
    node = await tree.find(path)
    boot_disk = None
    if isinstance(node, ImageFile):
        await node.open()  # reports a missing key
        only = os.fsdecode(node.name)
        boot_disk = machines.disk_of(only)
        if boot_disk is None:
            raise UsageError(
                f"{node} is not a disk of a virtual machine; boot the snapshot, or a drive-….img"
            )
        node = await tree.find(node.path.rpartition(b"/")[0])
    else:
        only = None
    if not isinstance(node, SnapshotDirectory):
        inside = first_of(map(os.fsdecode, await node.children())) if isinstance(node, Directory) else ""
        raise UsageError(
            f"{node} is neither a snapshot nor a disk image{f'; it has {inside}' if inside else ''}"
        )
    children = {os.fsdecode(name): file for name, file in (await node.children()).items()}
    images = {name: file for name, file in children.items() if isinstance(file, ImageFile)}
    wanted = {n: file for n, file in images.items() if only is None or n in (only, machines.EFI_DISK)}
    if not any(machines.disk_of(name) for name in wanted):
        raise NotFoundError(f"{node} has no disk to boot; it has {first_of(children) or 'nothing'}")
    sizes = {name: (await file.open()).size for name, file in wanted.items()}
    configuration = children.get(machines.CONFIGURATION)
    text = (
        (await configuration.read()).decode(errors="replace") if isinstance(configuration, BlobFile) else ""
    )
    machine = machines.find_machine(machines.parse_configuration(text), sizes, boot_disk=boot_disk)
    return Backup(os.fsdecode(node.path), machine)

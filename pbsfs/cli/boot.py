"""`pbsfs boot`: boots a backup in QEMU. The backup is not changed: what the guest writes goes to a layer."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click

from pbsfs.access.options import SourceOptions
from pbsfs.base.errors import HelperError, NotFoundError, OutputError, UsageError
from pbsfs.base.text import first_of
from pbsfs.boot import machine as machines
from pbsfs.boot import qemu as qemus
from pbsfs.boot.machine import Machine
from pbsfs.cli.inside import from_mounts
from pbsfs.cli.nbd import served
from pbsfs.cli.options import FilePath, PassingOn, passed_on, source_options
from pbsfs.nbd import launch
from pbsfs.nbd.launch import Address
from pbsfs.runtime.places import private_directory
from pbsfs.tree import BlobFile, Directory, ImageFile, SnapshotDirectory, Tree

QEMU = "qemu-system-x86_64"

_FIRMWARE = {
    machines.LARGE_EFI_VARIABLES: "OVMF_{}_4M.fd",
    machines.SMALL_EFI_VARIABLES: "OVMF_{}.fd",
}
_FIRMWARE_FOLDERS = ("/usr/share/OVMF", "/usr/share/edk2/x64", "/usr/share/edk2/ovmf")


@dataclass(frozen=True, slots=True)
class _Backup:
    """What is booted. `snapshot`: its path; `images`: sizes by name."""

    snapshot: str
    machine: Machine
    images: dict[str, int]


@click.command("boot", cls=PassingOn)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="PATH [QEMU OPTIONS]")
@click.option(
    "--keep",
    metavar="FILE",
    type=FilePath(dir_okay=False),
    help="Keep what the guest writes in this qcow2 overlay; boot again with it to go on (default: discard).",
)
@click.option(
    "--firmware",
    type=click.Choice(["bios", "uefi"]),
    help="Use this firmware (default: what the backup's configuration says, otherwise bios).",
)
@click.option(
    "--memory",
    metavar="MIB",
    type=click.IntRange(machines.MIN_MEMORY, 1 << 22),
    help="Give the guest this much memory (default: as configured, at most half of this computer's).",
)
@click.option("--kvm/--no-kvm", default=None, help="Use KVM (default: if /dev/kvm can be used).")
@source_options
def command(
    words: tuple[str, ...],
    keep: Path | None,
    firmware: str | None,
    memory: int | None,
    kvm: bool | None,
    source: SourceOptions,
) -> None:
    """Boot the snapshot or image at PATH in QEMU, without restoring it.

    A snapshot boots with all its disks, an image with that disk only. Memory, cores, firmware and disk
    controllers are those of the backup's qemu-server.conf, where it has one; there is no network.
    What follows PATH is passed on to QEMU, and wins.

    \b
    Examples:
      pbsfs boot --datastore-dir /srv/store1 vm/100/latest
      pbsfs boot vm/100/latest/drive-scsi0.img -nographic
      pbsfs boot --keep overlay.qcow2 vm/100/latest -nic user,model=virtio
    """
    path, *qemu_options = passed_on(words) or [""]
    if not path or path.startswith("-"):
        raise UsageError("name the snapshot or image to boot; QEMU's options follow it")
    source, (path,) = from_mounts(source, [path])
    qemu = shutil.which(QEMU)
    if qemu is None or shutil.which("qemu-img") is None:
        raise HelperError("QEMU is not installed: apt install qemu-system-x86 qemu-utils")
    with ExitStack() as stack:
        directory = stack.enter_context(private_directory())
        address = Address.of_socket(directory / "nbd.sock")
        serving = stack.enter_context(served(path, _find, address, ["--exit-with-parent"], source=source))
        backup = serving.found
        machine = _fitted(backup.machine, firmware, memory)
        drives = _Drives(backup, address, keep)
        stack.callback(drives.remove_new)
        if kvm is None:
            kvm = os.access("/dev/kvm", os.R_OK | os.W_OK)
        arguments = machines.qemu_arguments(machine, drives.of, kvm=kvm)
        if machine.uefi:
            arguments += _uefi(machine, drives, stack)
        arguments += qemus.confinement(qemu, qemu_options)
        display, screen = qemus.screen(qemu, qemu_options, os.environ, directory)
        arguments += display
        ours, theirs = map(stack.enter_context, socket.socketpair())
        arguments += ["-chardev", f"socket,id=pbsfs,fd={theirs.fileno()}", "-mon", "pbsfs,mode=control"]
        command_line = [*_ending_with_us(), qemu, "-name", path, *arguments, *qemu_options]
        child = subprocess.Popen(command_line, pass_fds=[theirs.fileno()])
        stack.callback(launch.stop, child)
        theirs.close()
        if _runs(ours):
            drives.keep_new()
            _tell(backup, machine, keep, screen)
        ours.close()
        status = child.wait()
    if status != 0:
        raise launch.ending("QEMU", status)


def _ending_with_us() -> list[str]:
    """What makes the kernel end QEMU should this process be killed: its disk is gone then."""
    setpriv = shutil.which("setpriv")  # of util-linux, which every Debian has
    return [setpriv, "--pdeathsig", "TERM"] if setpriv is not None else []


def _runs(monitor: socket.socket) -> bool:
    """Waits until QEMU has accepted its options, opened its disks and runs, or has ended; whether it runs.

    Its monitor is there from the start, but answers only then (QEMU's docs/interop/qmp-spec).
    """
    with suppress(BrokenPipeError, ConnectionResetError):
        monitor.sendall(b'{"execute": "qmp_capabilities"}\n')
        with monitor.makefile("rb") as lines:
            return any(b'"return"' in line for line in iter(lambda: lines.readline(1 << 16), b""))
    return False


async def _find(tree: Tree, path: str) -> tuple[str, _Backup]:
    """The snapshot that is to be served, and what is booted of it."""
    node = await tree.find(path)
    boot_disk = None
    if isinstance(node, ImageFile):
        await node.open()  # says so if the key is missing
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
        raise NotFoundError(f"{node} has no disk to boot; it has {', '.join(children) or 'nothing'}")
    sizes = {name: (await file.open()).size for name, file in wanted.items()}
    configuration = children.get(machines.CONFIGURATION)
    text = (
        (await configuration.read()).decode(errors="replace") if isinstance(configuration, BlobFile) else ""
    )
    machine = machines.find_machine(machines.parse_configuration(text), sizes, boot_disk=boot_disk)
    place = os.fsdecode(node.path)
    return place, _Backup(place, machine, sizes)


def _fitted(machine: Machine, firmware: str | None, memory: int | None) -> Machine:
    """`machine`, as the options want it, and as it fits this computer."""
    if firmware is not None:
        machine = replace(machine, uefi=firmware == "uefi")
    if memory is not None:
        return replace(machine, memory=memory)
    most = max(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 >> 20, machines.MIN_MEMORY)
    return replace(
        machine, memory=min(machine.memory, most), cores=min(machine.cores, len(os.sched_getaffinity(0)))
    )


def _tell(backup: _Backup, machine: Machine, keep: Path | None, screen: Path | None) -> None:
    firmware = "UEFI" if machine.uefi else "BIOS"
    kept = f"changes are kept in {keep}" if keep else "changes are discarded"
    click.echo(
        f"Booting {backup.snapshot}: {', '.join(machine.disks)}; {machine.memory} MiB, "
        f"{machine.cores} cores, {firmware}, no network; {kept}"
        + (f"; its screen: vncviewer {screen}" if screen is not None else ""),
        err=True,
    )


class _Drives:
    """How QEMU gets at each image: by NBD, with a layer for what is written."""

    def __init__(self, backup: _Backup, address: Address, keep: Path | None) -> None:
        self._backup = backup
        self._address = address
        # For QEMU, what comes before a colon is a protocol, unless there is a slash in it.
        self._keep = None if keep is None else Path(os.path.abspath(keep))
        self._new: list[Path] = []  # overlays that a machine which never runs should not leave behind

    def of(self, disk: str) -> list[str]:
        """For `-drive`, of the disk `scsi0` and so on."""
        return self.of_image(f"drive-{disk}.img", first=disk == self._backup.machine.disks[0])

    def of_image(self, image: str, *, first: bool = False) -> list[str]:
        uri = self._address.uri(f"{self._backup.snapshot}/{image}")
        if self._keep is None:
            return [f"file={qemus.escaped(uri)}", "format=raw", "snapshot=on"]
        overlay = self._keep
        if not first:
            overlay = overlay.with_name(f"{overlay.stem}-{image.removesuffix('.img')}{overlay.suffix}")
        if _prepare(overlay, uri):
            self._new.append(overlay)
        return [f"file={qemus.escaped(str(overlay))}", "format=qcow2"]

    def keep_new(self) -> None:
        """The machine runs: overlays that were made for it stay."""
        self._new.clear()

    def remove_new(self) -> None:
        """Removes the overlays that were made for a machine that never ran."""
        for overlay in self._new:
            overlay.unlink(missing_ok=True)


def _prepare(overlay: Path, uri: str) -> bool:
    """Makes `overlay` on the image at `uri`; one that is there has to be of the same image.

    Returns whether it is new.
    """
    try:
        found = overlay.exists()
    except OSError as error:
        raise OutputError(f"--keep {overlay}: {error.strerror}") from None
    if not found:
        _qemu_img(overlay, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", uri, str(overlay))
        return True
    told = json.loads(_qemu_img(overlay, "info", "--output=json", "-f", "qcow2", str(overlay)))
    before = told.get("full-backing-filename") or told.get("backing-filename") or ""
    if unquote(urlsplit(before).path) != unquote(urlsplit(uri).path):
        of = unquote(urlsplit(before).path).strip("/") or "something else"
        raise UsageError(
            f"--keep {overlay}: is an overlay of {of}, and would be none of this backup; "
            "boot that, or name another file"
        )
    # The same image, at the socket where it is served this time.
    _qemu_img(overlay, "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", uri, str(overlay))
    return False


def _qemu_img(overlay: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["qemu-img", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise OutputError(f"--keep {overlay}: {said[-1] if said else 'qemu-img failed'}")
    return done.stdout


def _uefi(machine: Machine, drives: _Drives, stack: ExitStack) -> list[str]:
    """The firmware, and its variables: those of the backup, or fresh ones."""
    stored = machine.efi_variables
    if stored and stored not in _FIRMWARE:
        click.echo(f"The UEFI variables of the backup ({stored} bytes) fit no firmware; fresh ones", err=True)
    pattern = _FIRMWARE.get(stored, _FIRMWARE[machines.LARGE_EFI_VARIABLES])
    folder = next((Path(f) for f in _FIRMWARE_FOLDERS if (Path(f) / pattern.format("CODE")).exists()), None)
    if folder is None:
        raise HelperError(
            f"the machine needs UEFI firmware ({pattern.format('CODE')}): apt install ovmf; "
            "or try --firmware bios"
        )
    code = folder / pattern.format("CODE")
    arguments = ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={qemus.escaped(str(code))}"]
    if stored in _FIRMWARE:
        return [*arguments, "-drive", ",".join(["if=pflash,unit=1", *drives.of_image(machines.EFI_DISK)])]
    fresh = stack.enter_context(private_directory()) / "variables.fd"
    shutil.copyfile(folder / pattern.format("VARS"), fresh)
    return [*arguments, "-drive", f"if=pflash,unit=1,format=raw,file={qemus.escaped(str(fresh))}"]

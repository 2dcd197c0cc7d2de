"""`pbsfs boot`: boots a backup in QEMU. The guest writes to overlays; the backup does not change."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import click

from pbsfs.access.options import SourceOptions
from pbsfs.base.errors import HelperError, UsageError
from pbsfs.base.text import counted
from pbsfs.boot import machine as machines
from pbsfs.boot import qemu as qemus
from pbsfs.boot.backup import Backup, find_backup
from pbsfs.boot.firmware import fits, uefi_arguments
from pbsfs.boot.machine import Machine
from pbsfs.boot.overlay import Drives
from pbsfs.cli.inside import from_mounts
from pbsfs.cli.options import log_format_option, source_options
from pbsfs.cli.parameters import FilePath, PassingOn, Whole, passed_on
from pbsfs.cli.running import described, run_on_described
from pbsfs.nbd import launch
from pbsfs.nbd.launch import Address
from pbsfs.nbd.serving import serving
from pbsfs.runtime.logs import LogOptions, set_up_logging
from pbsfs.runtime.places import private_directory
from pbsfs.runtime.process import signals_held_back

QEMU = "qemu-system-x86_64"


@click.command("boot", cls=PassingOn)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="PATH [QEMU OPTIONS]")
@click.option(
    "--keep",
    metavar="FILE",
    type=FilePath(dir_okay=False),
    help="Keep the guest's writes in this qcow2 overlay; boot with it again to continue (default: discard).",
)
@click.option(
    "--firmware",
    type=click.Choice(["bios", "uefi"]),
    help="Use this firmware (default: as configured in the backup, otherwise bios).",
)
@click.option(
    "--memory",
    metavar="MIB",
    type=Whole(machines.MIN_MEMORY, 1 << 22),
    help="Give the guest this much memory (default: as configured, at most half of this computer's).",
)
@click.option("--kvm/--no-kvm", default=None, help="Use KVM (default: if /dev/kvm can be used).")
@log_format_option
@source_options
def command(
    words: tuple[str, ...],
    keep: Path | None,
    firmware: str | None,
    memory: int | None,
    kvm: bool | None,
    log_format: str | None,
    source: SourceOptions,
) -> None:
    """Boot the snapshot or image at PATH in QEMU, without restoring it.

    A snapshot boots with all its disks, an image with that disk only. Memory, cores, firmware and disk
    controllers come from the backup's qemu-server.conf, if it has one. The guest has no network.
    Arguments after PATH are passed on to QEMU and take precedence.

    \b
    Examples:
      pbsfs boot --datastore-dir /srv/store1 vm/100/latest
      pbsfs boot vm/100/latest/drive-scsi0.img -nographic
      pbsfs boot --keep overlay.qcow2 vm/100/latest -nic user,model=virtio
    """
    set_up_logging(LogOptions(format=log_format))
    path, *qemu_options = passed_on(words) or [""]
    if not path or path.startswith("-"):
        raise UsageError("name the snapshot or image to boot; QEMU's options follow it")
    source, (path,) = from_mounts(source, [path])
    qemu = shutil.which(QEMU)
    if qemu is None or shutil.which("qemu-img") is None:
        raise HelperError("QEMU is not installed; apt install qemu-system-x86 qemu-utils")
    with ExitStack() as stack:
        directory = stack.enter_context(private_directory())
        address = Address.of_socket(directory / "nbd.sock")
        nbdkit = launch.find_nbdkit()
        description = described(source, reads_much=True)
        backup = run_on_described(lambda tree: find_backup(tree, path), description, first=path)
        stack.enter_context(
            serving(
                nbdkit, backup.snapshot, address, ["--exit-with-parent"], description, log_format=log_format
            )
        )
        machine = _fitted(backup.machine, firmware, memory)
        first = f"drive-{machine.disks[0]}.img"
        drives = Drives(lambda image: address.uri(f"{backup.snapshot}/{image}"), first, keep)
        stack.callback(drives.remove_new)
        if kvm is None:
            kvm = os.access("/dev/kvm", os.R_OK | os.W_OK)
        arguments = machines.qemu_arguments(machine, drives.of_disk, kvm=kvm)
        if machine.uefi:
            stored = machine.efi_variables
            if stored and not fits(stored):
                click.echo(
                    f"The UEFI variables of the backup ({stored} bytes) fit no firmware; new ones are used",
                    err=True,
                )
            arguments += uefi_arguments(stored, lambda: drives.of_image(machines.EFI_DISK), directory)
        arguments += qemus.confinement(qemu, qemu_options)
        display, screen = qemus.screen(qemu, qemu_options, os.environ, directory)
        arguments += display
        ours, theirs = map(stack.enter_context, socket.socketpair())
        arguments += qemus.monitor(theirs.fileno())
        command_line = [*qemus.ending_with_us(), qemu, "-name", path, *arguments, *qemu_options]
        with signals_held_back():
            child = subprocess.Popen(command_line, pass_fds=[theirs.fileno()])
            stack.callback(launch.stop, child)
        theirs.close()
        if qemus.runs(ours):
            drives.keep_new()
            click.echo(_summary(backup, machine, keep, screen), err=True)
        ours.close()
        status = child.wait()
    if status != 0:
        raise launch.ending("QEMU", status)


def _fitted(machine: Machine, firmware: str | None, memory: int | None) -> Machine:
    """`machine`, changed by the options, and reduced to what this computer has."""
    if firmware is not None:
        machine = replace(machine, uefi=firmware == "uefi")
    if memory is not None:
        return replace(machine, memory=memory)
    most = max(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 >> 20, machines.MIN_MEMORY)
    return replace(
        machine, memory=min(machine.memory, most), cores=min(machine.cores, len(os.sched_getaffinity(0)))
    )


def _summary(backup: Backup, machine: Machine, keep: Path | None, screen: Path | None) -> str:
    firmware = "UEFI" if machine.uefi else "BIOS"
    kept = f"changes are kept in {keep}" if keep else "changes are discarded"
    shown = f"; its screen: vncviewer {screen}" if screen is not None else ""
    return (
        f"Booting {backup.snapshot}: {', '.join(machine.disks)}; {machine.memory} MiB, "
        f"{counted(machine.cores, 'core')}, {firmware}, no network; {kept}{shown}"
    )

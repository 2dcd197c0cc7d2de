"""The virtual machine in a backup: from its qemu-server.conf to arguments for QEMU.

The configuration comes with the backup and is not trusted: only known words, and numbers within bounds,
become arguments. Networks, host devices and QEMU arguments in it are ignored, so that a machine that is
booted for a look reaches nothing. Pure; used by `pbsfs boot`.

The format is that of Proxmox VE (its manual, qm.conf).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

_DISK = re.compile(r"drive-((?:scsi|virtio|ide|sata)(?:\d|[12]\d|30))\.img", re.ASCII)
_UUID = re.compile(r"uuid=([0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})(?:,|$)", re.ASCII)

EFI_DISK = "drive-efidisk0.img"
CONFIGURATION = "qemu-server.conf"

DEFAULT_MEMORY = 2048
MIN_MEMORY = 16
"""MiB."""

MAX_CORES = 64

LARGE_EFI_VARIABLES = 540_672
SMALL_EFI_VARIABLES = 131_072
"""Bytes of the two kinds of UEFI variable store of Proxmox VE; each fits its own firmware."""

_SCSI_CONTROLLERS = {
    "lsi": ("lsi", 7),
    "lsi53c810": ("lsi53c810", 7),
    "megasas": ("megasas", 32),
    "pvscsi": ("pvscsi", 16),
    "virtio-scsi-pci": ("virtio-scsi-pci", 32),
    "virtio-scsi-single": ("virtio-scsi-pci", 32),
}
"""By `scsihw`: QEMU's device, and how many disks one of it takes."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine to boot.

    `disks`: names like `scsi0` of the disks in the backup; the first one boots. `memory`: MiB.
    `efi_variables`: bytes of the variable store in the backup, 0 for none.
    """

    disks: tuple[str, ...]
    memory: int = DEFAULT_MEMORY
    cores: int = 1
    chipset: str = "pc"
    uefi: bool = False
    efi_variables: int = 0
    scsi_controller: str = "virtio-scsi-pci"
    local_time: bool = False
    uuid: str | None = None


def parse_configuration(text: str) -> dict[str, str]:
    """The settings of the machine as it was backed up, without those of its snapshots in Proxmox VE."""
    settings: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("["):  # from here on: snapshots, cloud-init, pending changes
            break
        name, colon, value = line.partition(":")
        if colon and not line.startswith("#"):
            settings[name.strip()] = value.strip()
    return settings


def disk_of(image: str) -> str | None:
    """`drive-scsi0.img` is `scsi0`; None for an image that is not a disk of a machine."""
    match = _DISK.fullmatch(image)
    return None if match is None else match[1]


def find_machine(
    settings: Mapping[str, str], images: Mapping[str, int], *, boot_disk: str | None = None
) -> Machine:
    """The machine that `settings` describe, with those of its disks that are in `images`.

    `settings`: empty if the backup has none. `images`: sizes in bytes, by name. `boot_disk`: boots first,
    regardless of the settings.
    """
    present = [disk for disk in map(disk_of, images) if disk is not None]
    wanted = [boot_disk, *_boot_order(settings), *sorted(present, key=_as_numbers)]
    order = [disk for disk in dict.fromkeys(wanted) if disk in present]
    smbios = _UUID.search(settings.get("smbios1", ""))
    memory = settings.get("memory", "").removeprefix("current=")
    hardware = settings.get("scsihw", "lsi" if settings else "virtio-scsi-pci")
    return Machine(
        disks=tuple(order),
        memory=_number(memory, DEFAULT_MEMORY, MIN_MEMORY, 1 << 22),
        cores=min(
            _number(settings.get("cores", ""), 1, 1, MAX_CORES)
            * _number(settings.get("sockets", ""), 1, 1, MAX_CORES),
            MAX_CORES,
        ),
        chipset="q35" if "q35" in settings.get("machine", "") else "pc",
        uefi=settings.get("bios") == "ovmf",
        efi_variables=images.get(EFI_DISK, 0),
        scsi_controller=hardware if hardware in _SCSI_CONTROLLERS else "virtio-scsi-pci",
        local_time=settings.get("ostype", "").startswith("w"),
        uuid=None if smbios is None else smbios[1],
    )


def qemu_arguments(machine: Machine, drive: Callable[[str], Sequence[str]], *, kvm: bool) -> list[str]:
    """QEMU's arguments for `machine`, without firmware.

    `drive`: for a disk `scsi0` and so on, the parts of QEMU's `-drive` such as file and format.
    """
    arguments = ["-machine", machine.chipset]
    # KVM inside a virtual machine may refuse that feature, and then QEMU would not start.
    cpu = "host,arch-capabilities=off" if kvm else "max"
    arguments += ["-accel", "kvm" if kvm else "tcg", "-cpu", cpu]
    arguments += ["-m", str(machine.memory), "-smp", str(machine.cores), "-nic", "none"]
    arguments += ["-rtc", "base=localtime"] if machine.local_time else []
    arguments += ["-smbios", f"type=1,uuid={machine.uuid}"] if machine.uuid is not None else []
    controllers: set[str] = set()
    # QEMU's own option -kernel takes the index 0.
    for place, disk in enumerate(machine.disks, start=1):
        controller, device = _device(machine, disk)
        if controller is not None and controller not in controllers:
            controllers.add(controller)
            arguments += ["-device", controller]
        arguments += ["-drive", ",".join(["if=none", f"id=drive-{disk}", *drive(disk)])]
        arguments += ["-device", f"{device},drive=drive-{disk},id={disk},bootindex={place}"]
    return arguments


def _device(machine: Machine, disk: str) -> tuple[str | None, str]:
    """The controller that a disk needs besides those of the chipset, and the disk's device."""
    bus, number = _as_numbers(disk)
    if bus == "virtio":
        return None, "virtio-blk-pci"
    if bus == "scsi":
        kind, most = _SCSI_CONTROLLERS[machine.scsi_controller]
        name = f"scsihw{number // most}"
        return f"{kind},id={name}", f"scsi-hd,bus={name}.0,scsi-id={number % most}"
    if bus == "sata":
        name = f"ahci{number // 6}"
        return f"ahci,id={name}", f"ide-hd,bus={name}.{number % 6}"
    if machine.chipset == "q35":  # its own controller is AHCI, with one disk on each port
        return None, f"ide-hd,bus=ide.{number % 6}"
    return None, f"ide-hd,bus=ide.{number // 2 % 2},unit={number % 2}"


def _boot_order(settings: Mapping[str, str]) -> Iterable[str]:
    for part in settings.get("boot", "").split(","):
        name, _equals, value = part.partition("=")
        if name.strip() == "order":
            yield from value.split(";")
    if "bootdisk" in settings:
        yield settings["bootdisk"]


def _as_numbers(disk: str) -> tuple[str, int]:
    bus = disk.rstrip("0123456789")
    return bus, int(disk[len(bus) :])


def _number(text: str, default: int, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        return default
    return min(max(int(text), least), most)

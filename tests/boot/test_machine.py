"""The machine of a backup: what becomes of its configuration, and what never reaches QEMU."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pbsfs.boot.machine import (
    DEFAULT_MEMORY,
    LARGE_EFI_VARIABLES,
    MAX_CORES,
    Machine,
    disk_of,
    find_machine,
    parse_configuration,
    qemu_arguments,
)

BUSES = ("scsi", "virtio", "ide", "sata")

UUID = "0d5a1a5c-7ab6-4f3e-b7a8-6d0fb2b5c0de"


def machine(configuration: str, *disks: str, boot_disk: str | None = None) -> Machine:
    """The machine of a backup with these disks, and with this configuration."""
    images = {f"drive-{disk}.img": 1 << 20 for disk in disks or ("scsi0",)}
    return find_machine(parse_configuration(configuration), images, boot_disk=boot_disk)


def arguments(configuration: str, *disks: str, kvm: bool = False) -> list[str]:
    """What QEMU is told of it."""
    return qemu_arguments(machine(configuration, *disks), lambda disk: [f"file=/{disk}"], kvm=kvm)


def values(words: list[str], option: str) -> list[str]:
    """What is given with `option`, each time."""
    return [value for name, value in pairwise(words) if name == option]


# --- the text


def test_settings_are_the_lines_up_to_the_first_section() -> None:
    text = (
        "#a note: of its owner\n\nname: web\r\nscsi0: local-lvm:vm-100-disk-0,size=32G\n"
        "  cores :  2 \nnonsense\n"
        "[before-upgrade]\nname: old\ncores: 8\nbios: ovmf\n[special:cloudinit]\nmemory: 1\n"
    )
    assert parse_configuration(text) == {
        "name": "web",
        "scsi0": "local-lvm:vm-100-disk-0,size=32G",
        "cores": "2",
    }


def test_an_empty_configuration_is_no_failure() -> None:
    assert parse_configuration("") == {}
    assert parse_configuration("[only-a-section]\ncores: 2\n") == {}


@pytest.mark.parametrize(
    ("image", "disk"),
    [
        *((f"drive-{bus}{number}.img", f"{bus}{number}") for bus in BUSES for number in (0, 9, 10, 29, 30)),
        ("drive-scsi31.img", None),
        ("drive-scsi100.img", None),
        ("drive-scsi-1.img", None),
        ("drive-scsi٣.img", None),
        ("drive-scsi.img", None),
        ("drive-scsi0.img\n", None),
        ("drive-scsi0.img.fidx", None),
        ("drive-nvme0.img", None),
        ("drive-efidisk0.img", None),
        ("drive-tpmstate0.img", None),
        ("drive-tpmstate0-backup.img", None),
        ("scsi0.img", None),
        ("disk.img", None),
        ("", None),
    ],
)
def test_only_disks_of_a_machine_are_disks(image: str, disk: str | None) -> None:
    assert disk_of(image) == disk


# --- what is found


def test_without_a_configuration_all_disks_are_there_in_their_order() -> None:
    found = machine("", "scsi10", "ide0", "scsi2", "virtio0", "sata1")
    assert found == Machine(disks=("ide0", "sata1", "scsi2", "scsi10", "virtio0"))
    assert (found.memory, found.cores, found.chipset, found.uefi) == (DEFAULT_MEMORY, 1, "pc", False)


@pytest.mark.parametrize(
    ("configuration", "order"),
    [
        ("boot: order=scsi1;net0;scsi0", ["scsi1", "scsi0", "virtio2"]),
        ("boot: order=virtio2", ["virtio2", "scsi0", "scsi1"]),
        ("boot: order=ide2;net0;scsi1;scsi1", ["scsi1", "scsi0", "virtio2"]),
        ("boot: cdn\nbootdisk: scsi1", ["scsi1", "scsi0", "virtio2"]),
        ("bootdisk: ide0", ["scsi0", "scsi1", "virtio2"]),
        ("boot: c", ["scsi0", "scsi1", "virtio2"]),
        ("boot: legacy=cdn", ["scsi0", "scsi1", "virtio2"]),
        ("boot: order=", ["scsi0", "scsi1", "virtio2"]),
        ("boot: order=scsi0.img,,;-kernel;scsi9", ["scsi0", "scsi1", "virtio2"]),
    ],
)
def test_the_disk_to_boot_comes_first_and_none_is_lost(configuration: str, order: list[str]) -> None:
    assert list(machine(configuration, "scsi0", "scsi1", "virtio2").disks) == order


def test_who_names_a_disk_boots_that() -> None:
    assert machine("boot: order=scsi0", "scsi0", "scsi1", boot_disk="scsi1").disks == ("scsi1", "scsi0")


def test_what_is_no_disk_is_not_attached() -> None:
    images = {"drive-scsi0.img": 1, "drive-efidisk0.img": LARGE_EFI_VARIABLES, "drive-tpmstate0.img": 4 << 20}
    found = find_machine({"bios": "ovmf", "boot": "order=efidisk0;tpmstate0"}, images)
    assert found.disks == ("scsi0",)
    assert (found.uefi, found.efi_variables) == (True, LARGE_EFI_VARIABLES)


@pytest.mark.parametrize(
    ("value", "memory"),
    [
        ("4096", 4096),
        ("current=1024", 1024),
        ("1", 16),
        ("999999999", 1 << 22),
        ("9" * 5000, DEFAULT_MEMORY),
        ("-1", DEFAULT_MEMORY),
        ("0x1000", DEFAULT_MEMORY),
        ("٤٠٩٦", DEFAULT_MEMORY),
        ("512,maxmem=1T", DEFAULT_MEMORY),
        ("", DEFAULT_MEMORY),
    ],
)
def test_memory_is_a_number_within_bounds(value: str, memory: int) -> None:
    assert machine(f"memory: {value}").memory == memory


@pytest.mark.parametrize(
    ("configuration", "cores"),
    [
        ("cores: 4", 4),
        ("cores: 4\nsockets: 2", 8),
        ("sockets: 2", 2),
        ("cores: 0", 1),
        ("cores: 64\nsockets: 64", MAX_CORES),
        ("cores: 99999999999999", 1),
        ("cores: 2,maxcpus=9", 1),
    ],
)
def test_cores_are_a_number_within_bounds(configuration: str, cores: int) -> None:
    assert machine(configuration).cores == cores


@pytest.mark.parametrize(
    ("configuration", "chipset"),
    [
        ("", "pc"),
        ("machine: pc-i440fx-8.1", "pc"),
        ("machine: q35", "q35"),
        ("machine: pc-q35-8.1+pve0", "q35"),
        ("machine: type=q35,viommu=intel", "q35"),
        ("machine: none,kernel=/etc/shadow", "pc"),
    ],
)
def test_there_are_two_chipsets(configuration: str, chipset: str) -> None:
    assert values(arguments(configuration), "-machine") == [chipset]


@pytest.mark.parametrize(
    ("ostype", "local"), [("l26", False), ("win11", True), ("wxp", True), ("w2k8", True), ("other", False)]
)
def test_windows_has_its_clock_in_local_time(ostype: str, local: bool) -> None:
    assert values(arguments(f"ostype: {ostype}"), "-rtc") == ["base=localtime"] * local


@pytest.mark.parametrize(
    ("value", "uuid"),
    [
        (f"uuid={UUID}", UUID),
        (f"base64=1,uuid={UUID},manufacturer=QWNtZQ==", UUID),
        (f"uuid={UUID}0", None),
        (f"uuid={UUID[:-1]}", None),
        (f"uuid={UUID.replace('-', '')}", None),
        ("manufacturer=Acme,file=/etc/shadow", None),
        ("", None),
    ],
)
def test_of_smbios_only_the_uuid_is_taken(value: str, uuid: str | None) -> None:
    expected = [] if uuid is None else [f"type=1,uuid={uuid}"]
    assert values(arguments(f"smbios1: {value}"), "-smbios") == expected


# --- what QEMU is told

LSI = "scsi-hd,bus=scsihw0.0,scsi-id={}"


@pytest.mark.parametrize(
    ("configuration", "disk", "devices"),
    [
        ("", "scsi3", ["virtio-scsi-pci,id=scsihw0", LSI.format(3)]),
        # Without scsihw, Proxmox VE takes its default, which is this one.
        ("name: web", "scsi3", ["lsi,id=scsihw0", LSI.format(3)]),
        ("scsihw: lsi", "scsi8", ["lsi,id=scsihw1", "scsi-hd,bus=scsihw1.0,scsi-id=1"]),
        ("scsihw: lsi53c810", "scsi0", ["lsi53c810,id=scsihw0", LSI.format(0)]),
        ("scsihw: megasas", "scsi30", ["megasas,id=scsihw0", LSI.format(30)]),
        ("scsihw: pvscsi", "scsi16", ["pvscsi,id=scsihw1", "scsi-hd,bus=scsihw1.0,scsi-id=0"]),
        ("scsihw: virtio-scsi-pci", "scsi30", ["virtio-scsi-pci,id=scsihw0", LSI.format(30)]),
        ("scsihw: virtio-scsi-single", "scsi1", ["virtio-scsi-pci,id=scsihw0", LSI.format(1)]),
        ("scsihw: vfio-pci,host=01:00.0", "scsi0", ["virtio-scsi-pci,id=scsihw0", LSI.format(0)]),
        ("", "virtio15", ["virtio-blk-pci"]),
        ("", "ide0", ["ide-hd,bus=ide.0,unit=0"]),
        ("", "ide1", ["ide-hd,bus=ide.0,unit=1"]),
        ("", "ide3", ["ide-hd,bus=ide.1,unit=1"]),
        ("machine: q35", "ide1", ["ide-hd,bus=ide.1"]),
        ("", "sata5", ["ahci,id=ahci0", "ide-hd,bus=ahci0.5"]),
        ("machine: q35", "sata0", ["ahci,id=ahci0", "ide-hd,bus=ahci0.0"]),
    ],
)
def test_every_disk_has_its_place_at_its_controller(
    configuration: str, disk: str, devices: list[str]
) -> None:
    *controllers, device = values(arguments(configuration, disk), "-device")
    assert controllers == devices[:-1]
    assert device.rpartition(",bootindex=")[0] == f"{devices[-1]},drive=drive-{disk},id={disk}"


def test_a_disk_has_its_file_and_the_machine_boots_in_order() -> None:
    words = arguments("boot: order=virtio0", "ide0", "virtio0")
    assert values(words, "-drive") == [
        "if=none,id=drive-virtio0,file=/virtio0",
        "if=none,id=drive-ide0,file=/ide0",
    ]
    assert [device.rpartition(",")[2] for device in values(words, "-device")] == [
        "bootindex=1",
        "bootindex=2",
    ]


def test_disks_share_a_controller_until_it_is_full() -> None:
    words = arguments("scsihw: lsi", *(f"scsi{number}" for number in range(15)))
    devices = values(words, "-device")
    controllers = [device for device in devices if device.startswith("lsi,")]
    places = [tuple(device.split(",")[1:3]) for device in devices if device.startswith("scsi-hd")]
    assert controllers == ["lsi,id=scsihw0", "lsi,id=scsihw1", "lsi,id=scsihw2"]
    assert places == [(f"bus=scsihw{n // 7}.0", f"scsi-id={n % 7}") for n in range(15)]


@pytest.mark.parametrize("chipset", ["pc", "q35"])
def test_no_two_disks_have_one_place(chipset: str) -> None:
    """As many of each bus as Proxmox VE allows."""
    most = {"scsi": 31, "virtio": 16, "ide": 4, "sata": 6}
    disks = [f"{bus}{number}" for bus, count in most.items() for number in range(count)]
    devices = values(arguments(f"machine: {chipset}\nscsihw: pvscsi", *disks), "-device")
    places = [d.partition(",drive=")[0] for d in devices if "drive=" in d and "virtio-blk" not in d]
    assert len(set(places)) == len(places) == 31 + 4 + 6
    assert len(set(devices)) == len(devices)


@pytest.mark.parametrize(("kvm", "accelerator"), [(True, "kvm"), (False, "tcg")])
def test_kvm_is_used_where_it_is_there(kvm: bool, accelerator: str) -> None:
    assert values(arguments("", kvm=kvm), "-accel") == [accelerator]


HOSTILE = """\
args: -netdev user,id=n -device e1000,netdev=n
hostpci0: 0000:01:00.0,x-vga=1
usb0: host=1234:5678
net0: virtio=BC:24:11:00:00:01,bridge=vmbr0
serial0: /dev/ttyS0
parallel0: /dev/parport0
vga: qxl
cpu: host,flags=+x -monitor
cpuunits: 1,2
rng0: source=/dev/hwrng
audio0: device=AC97
ide2: /etc/shadow,media=cdrom
scsi0: /etc/shadow
unused0: /etc/shadow
machine: q35,kernel=/etc/shadow
bios: ovmf,file=/etc/shadow
scsihw: lsi,id=evil
smbios1: uuid=evil,file=/etc/shadow
name: -monitor stdio
hookscript: local:snippets/evil
cores: 2 -monitor stdio
memory: 512 -monitor stdio
sockets: 2,maxcpus=9
"""


def test_what_reaches_out_of_the_machine_is_left_out() -> None:
    assert arguments(HOSTILE) == [
        *("-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", str(DEFAULT_MEMORY), "-smp", "1"),
        *("-nic", "none", "-device", "virtio-scsi-pci,id=scsihw0"),
        *("-drive", "if=none,id=drive-scsi0,file=/scsi0"),
        *("-device", "scsi-hd,bus=scsihw0.0,scsi-id=0,drive=drive-scsi0,id=scsi0,bootindex=1"),
    ]


SHAPES = (
    r"-(machine|accel|cpu|m|smp|nic|rtc|smbios|drive|device)",
    r"pc|q35|tcg|max|none|base=localtime",
    r"\d{1,7}",
    r"type=1,uuid=[0-9a-fA-F-]{36}",
    r"(lsi|lsi53c810|megasas|pvscsi|virtio-scsi-pci),id=scsihw\d",
    r"ahci,id=ahci\d",
    r"if=none,id=drive-[a-z]+\d+,file=/[a-z]+\d+",
    (
        r"(virtio-blk-pci|scsi-hd,bus=scsihw\d\.0,scsi-id=\d+|ide-hd,bus=(ahci\d|ide)\.\d(,unit=[01])?)"
        r",drive=drive-[a-z]+\d+,id=[a-z]+\d+,bootindex=\d+"
    ),
)
SHAPE = re.compile("|".join(f"(?:{shape})" for shape in SHAPES), re.ASCII)

NAMES = st.sampled_from(
    (
        *("args", "bios", "boot", "bootdisk", "cores", "machine", "memory", "net0", "ostype", "scsi0"),
        *("scsihw", "smbios1", "sockets"),
    )
)
VALUES = st.text() | st.sampled_from(
    ("order=scsi0;ide1,", "lsi,id=x", "q35,x", "win\n-x", f"uuid={UUID},x=y", "9" * 30, "-1")
)
LINES = st.builds("{}: {}".format, NAMES, VALUES) | st.text()
DISKS = st.sets(st.builds("{}{}".format, st.sampled_from(BUSES), st.integers(0, 30)), min_size=1)


@given(st.lists(LINES).map("\n".join), DISKS, st.booleans())
@example(HOSTILE, {"scsi0", "ide3"}, True)
def test_whatever_the_configuration_says_qemu_gets_words_of_a_known_shape(
    configuration: str, disks: set[str], uefi: bool
) -> None:
    text = configuration + "\nbios: ovmf" * uefi
    words = arguments(text, *disks)
    assert not [word for word in words if not SHAPE.fullmatch(word)]
    assert len(values(words, "-drive")) == len(disks)
    assert values(words, "-nic") == ["none"]


@given(st.text())
def test_whatever_an_image_is_called_it_is_a_disk_or_none(name: str) -> None:
    disk = disk_of(f"drive-{name}.img")
    assert disk in (None, name)
    assert disk is None or re.fullmatch(r"(scsi|virtio|ide|sata)\d{1,2}", disk, re.ASCII)

"""`pbsfs boot`, by the real program and the real QEMU: what the guest reads and writes, and how it ends.

All machines are emulated: they are the same on a computer that could do better.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pbsfs.formats.manifest import CryptMode
from pbsfs.testing.demo import PARTITION_START
from pbsfs.testing.writer import DatastoreWriter
from tests.support import booting, keyfiles, made
from tests.support.booting import NO_SCREEN, BootDisk
from tests.support.foreground import Foreground, foreground
from tests.support.needs import need
from tests.support.program import environment, error_of, output_of, pbsfs
from tests.support.serving import access, serving
from tests.support.stocked import stock
from tests.support.waiting import wait_until

FIRST = "2023-11-14T22:13:20Z"
SECOND = "2023-11-15T22:13:20Z"

VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")


@pytest.fixture(scope="module", autouse=True)
def _programs() -> None:
    need("qemu-system-x86_64", "qemu-img", "nbdkit")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> BootDisk:
    return booting.boot_disk(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def other_disk(tmp_path_factory: pytest.TempPathFactory) -> BootDisk:
    return booting.boot_disk(tmp_path_factory.mktemp("other"), seed=2, mebibytes=1)


@pytest.fixture
def writer(tmp_path: Path) -> DatastoreWriter:
    return DatastoreWriter(tmp_path / "datastore")


def back_up(writer: DatastoreWriter, disks: dict[str, bytes], *lines: str, time: int = made.TIME) -> str:
    """A backup of a machine with these disks and lines in its configuration; its path."""
    files = {f"drive-{name}.img.fidx": data for name, data in disks.items()}
    if lines:
        files["qemu-server.conf.blob"] = "".join(f"{line}\n" for line in lines).encode()
    writer.add_snapshot(made.snapshot(time=time), files)
    return f"vm/100/{FIRST if time == made.TIME else SECOND}"


@contextmanager
def booted(writer: DatastoreWriter, *arguments: str | Path) -> Iterator[Foreground]:
    """`pbsfs boot ARGUMENTS`, and nothing is left of it afterwards."""
    with foreground("boot", "--no-kvm", "--datastore-dir", writer.path, *arguments) as command:
        yield command
        if command.process.poll() is None:
            command.ended()


def said(writer: DatastoreWriter, *arguments: str | Path) -> str:
    """What the guest says on its serial port until it powers off."""
    with booted(writer, *arguments, *NO_SCREEN) as command:
        status = command.ended()
        assert (status, len(command.errors())) == (0, 1), command.errors()
        return command.output()


def refused(writer: DatastoreWriter, status: int, *arguments: str | Path) -> str:
    """The one line with which `pbsfs boot` refuses."""
    return error_of(pbsfs("boot", "--no-kvm", "--datastore-dir", writer.path, *arguments), status)


# --- a guest that reads, through its firmware

PC, Q35 = "pc-i440fx-7.2", "q35"


@pytest.mark.parametrize(
    ("name", "chipset", "lines"),
    [
        ("scsi9", PC, "scsihw: lsi"),
        ("scsi0", Q35, "name: web"),  # without scsihw it is lsi too
        ("scsi0", PC, "scsihw: virtio-scsi-pci"),
        ("scsi30", Q35, "scsihw: virtio-scsi-single"),
        ("scsi3", Q35, "scsihw: megasas"),
        ("scsi17", PC, "scsihw: pvscsi"),
        ("virtio0", PC, "cores: 2"),
        ("virtio15", Q35, "sockets: 2"),
        ("ide0", PC, "ostype: win11"),
        ("ide3", PC, "ostype: l26"),
        ("ide1", Q35, "cpu: host"),
        ("sata0", PC, "smbios1: uuid=0d5a1a5c-7ab6-4f3e-b7a8-6d0fb2b5c0de"),
        ("sata5", Q35, "args: -no-such-option"),
    ],
)
def test_a_guest_reads_all_of_its_disk(
    writer: DatastoreWriter, disk: BootDisk, name: str, chipset: str, lines: str
) -> None:
    path = back_up(writer, {name: disk.data}, f"machine: {chipset}", "memory: 64", lines)
    assert disk.found(1) in said(writer, path)


def test_a_backup_without_a_configuration_boots_too(writer: DatastoreWriter, disk: BootDisk) -> None:
    back_up(writer, {"scsi0": disk.data})
    with booted(writer, "--memory", "64", "vm/100/latest", *NO_SCREEN) as command:
        assert command.ended() == 0
        assert disk.found(1) in command.output()
        assert command.errors() == [
            f"Booting vm/100/{FIRST}: scsi0; 64 MiB, 1 core, BIOS, no network; changes are discarded"
        ]


def test_an_image_boots_alone(writer: DatastoreWriter, disk: BootDisk, other_disk: BootDisk) -> None:
    disks = {"virtio0": disk.data, "virtio1": other_disk.data}
    path = back_up(writer, disks, "boot: order=virtio0", "memory: 64")
    with booted(writer, f"{path}/drive-virtio1.img", *NO_SCREEN) as command:
        assert command.ended() == 0
        assert other_disk.found(1) in command.output()
        assert f"Booting {path}: virtio1;" in command.errors()[0]


@pytest.mark.parametrize("first", ["virtio0", "scsi1"])
def test_the_configuration_says_which_disk_boots(
    writer: DatastoreWriter, disk: BootDisk, other_disk: BootDisk, first: str
) -> None:
    disks = {"virtio0": disk.data, "scsi1": other_disk.data}
    path = back_up(writer, disks, f"boot: order=net0;{first}", "scsihw: virtio-scsi-pci", "memory: 64")
    expected = {"virtio0": disk, "scsi1": other_disk}[first]
    assert expected.found(1) in said(writer, path)


def test_qemus_options_are_passed_on_and_win(writer: DatastoreWriter, disk: BootDisk) -> None:
    path = back_up(writer, {"virtio0": disk.data}, "memory: 64")
    with booted(writer, path, "-nographic", "-m", "48", "-name", "guest", "-no-reboot") as command:
        assert command.ended() == 0
        assert disk.found(1) in command.output()


@pytest.mark.parametrize("own", [[], ["-sandbox", "off"]])
def test_qemu_is_confined_and_its_screen_private(
    writer: DatastoreWriter, disk: BootDisk, own: list[str]
) -> None:
    path = back_up(writer, {"virtio0": disk.data}, "memory: 64")
    with booted(writer, path, "-S", *own) as command:
        wait_until(lambda: len(command.errors()) == 1, "it has told where the screen is")
        screen = Path(command.errors()[0].rpartition("vncviewer ")[2])
        assert screen.is_socket()
        assert not screen.parent.stat().st_mode & 0o077
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(screen))
            assert client.recv(4) == b"RFB "
        (qemu,) = command.programs("qemu-system-x86")
        assert ("Seccomp:\t2" in Path(f"/proc/{qemu}/status").read_text()) == (not own)
        command.stop()
    assert not screen.exists()


def test_an_encrypted_backup_boots_with_its_key(
    writer: DatastoreWriter, disk: BootDisk, tmp_path: Path
) -> None:
    writer.add_snapshot(
        made.snapshot(), {"drive-scsi0.img.fidx": disk.data}, crypt_mode=CryptMode.ENCRYPT, key=made.KEY
    )
    (key := tmp_path / "key.json").write_bytes(keyfiles.key_file())
    assert disk.found(1) in said(writer, "--keyfile", key, "--memory", "64", "vm/100/latest")
    for path in ("vm/100/latest", "vm/100/latest/drive-scsi0.img"):
        assert made.KEY.fingerprint[:8] in refused(writer, 5, path)


def test_a_backup_boots_from_a_server(writer: DatastoreWriter, disk: BootDisk) -> None:
    path = back_up(writer, {"virtio0": disk.data}, "memory: 64")
    with serving(writer.path) as server:
        with foreground("boot", "--no-kvm", path, *NO_SCREEN, env=access(server)) as command:
            assert command.ended() == 0
            assert disk.found(1) in command.output()
        wait_until(lambda: not server.open_sessions(), "no session outlives it")


def test_qemu_gets_no_secrets(writer: DatastoreWriter, tmp_path: Path, disk: BootDisk) -> None:
    path = back_up(writer, {"virtio0": disk.data}, "memory: 64")
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "qemu-system-x86_64"
    program.write_text("#!/bin/sh\nenv\n")
    program.chmod(0o755)
    with serving(writer.path) as server:
        told = access(server)
        told = told | {"PATH": f"{folder}:{told['PATH']}", "PBS_ENCRYPTION_PASSWORD": "geheim"}
        told |= {"PBS_MASTER_KEY_PASSWORD": "geheim", "PBS_PASSWORD_FILE": "/geheim"}
        done = pbsfs("boot", path, env=told)
        own = pbsfs("boot", "--datastore-dir", writer.path, path, env=told)
    for output in (done.stdout, own.stdout):
        assert "PBS_REPOSITORY=" in output
        assert "PBS_PASSWORD" not in output
        assert "geheim" not in output
    assert (done.returncode, own.returncode) == (0, 0)


# --- a guest that writes


def test_what_the_guest_writes_is_thrown_away(writer: DatastoreWriter, disk: BootDisk) -> None:
    path = back_up(writer, {"virtio0": disk.data}, "memory: 64")
    before = files_of(writer.path)
    for _ in range(2):
        assert disk.found(1) in said(writer, path)
    assert files_of(writer.path) == before


def test_what_the_guest_writes_is_kept_where_that_is_wanted(
    writer: DatastoreWriter, disk: BootDisk, other_disk: BootDisk, tmp_path: Path
) -> None:
    disks = {"virtio0": disk.data, "scsi1": other_disk.data}
    path = back_up(writer, disks, "boot: order=virtio0", "scsihw: pvscsi", "memory: 64")
    before = files_of(writer.path)
    (folder := tmp_path / "kept, here").mkdir()
    keep = folder / "over lay.qcow2"
    for count in (1, 2, 3):
        with booted(writer, "--keep", keep, path, *NO_SCREEN) as command:
            assert command.ended() == 0
            assert disk.found(count) in command.output()
            assert command.errors()[0].endswith(f"; changes are kept in {keep}")
    assert sorted(file.name for file in folder.iterdir()) == ["over lay-drive-scsi1.qcow2", "over lay.qcow2"]
    assert files_of(writer.path) == before
    assert disk.found(1) in said(writer, path)


def test_an_overlay_goes_with_the_backup_that_it_is_of(
    writer: DatastoreWriter, disk: BootDisk, tmp_path: Path
) -> None:
    first = back_up(writer, {"virtio0": disk.data}, "memory: 64")
    second = back_up(writer, {"virtio0": disk.data}, "memory: 64", time=made.TIME + made.DAY)
    keep = tmp_path / "overlay.qcow2"
    assert disk.found(1) in said(writer, "--keep", keep, first)
    before = keep.read_bytes()
    for path in (second, "vm/100/latest"):
        text = error_of_boot(writer, 2, "--keep", keep, path)
        assert f"--keep {keep}: is an overlay of {first}/drive-virtio0.img" in text
    assert keep.read_bytes() == before
    assert disk.found(2) in said(writer, "--keep", keep, first)


def error_of_boot(writer: DatastoreWriter, status: int, *arguments: str | Path) -> str:
    """The line with which it fails when what it has to serve is served already; and nothing is left."""
    with booted(writer, *arguments, *NO_SCREEN) as command:
        assert command.ended() == status
        assert command.output() == ""
        *_, last = command.errors()
        assert last.startswith("pbsfs: ")
        return last


def test_what_is_no_overlay_is_left_as_it_is(writer: DatastoreWriter, disk: BootDisk, tmp_path: Path) -> None:
    path = back_up(writer, {"virtio0": disk.data}, "memory: 64")
    (file := tmp_path / "precious").write_bytes(b"x" * 4096)
    assert f"--keep {file}: " in error_of_boot(writer, 8, "--keep", file, path)
    assert file.read_bytes() == b"x" * 4096
    output_of("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "other.qcow2", "1M")
    text = error_of_boot(writer, 2, "--keep", tmp_path / "other.qcow2", path)
    assert "is an overlay of something else" in text
    text = error_of_boot(writer, 8, "--keep", tmp_path / "none" / "overlay", path)
    assert f"{tmp_path / 'none'} is not a directory; name a file in another directory" in text


def test_an_overlay_that_is_in_use_is_not_taken(writer: DatastoreWriter, tmp_path: Path) -> None:
    path = back_up(writer, {"virtio0": endless()}, "memory: 64")
    keep = tmp_path / "overlay.qcow2"
    with booted(writer, "--keep", keep, path, *NO_SCREEN) as command:
        assert command.line() == "on"
        assert "Is another process using" in error_of_boot(writer, 8, "--keep", keep, path)
        assert command.stop() == 143


def test_an_overlay_may_have_any_name(
    writer: DatastoreWriter, disk: BootDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = back_up(writer, {"virtio0": disk.data}, "memory: 64")
    monkeypatch.chdir(tmp_path)
    for count in (1, 2):
        assert disk.found(count) in said(writer, "--keep", "nbd:a, b", path)
    assert (tmp_path / "nbd:a, b").exists()


# --- Linux

SCRIPT = """\
mount -t ext4 /dev/vda1 /mnt
echo "read: $(sha256sum </mnt/data)"
echo kept >/mnt/new
sync
umount /mnt
mount -t ext4 /dev/vda1 /mnt
echo "read back: $(cat /mnt/new)"
umount /mnt
poweroff -f
"""


def linux_disk(folder: Path, data: bytes) -> bytes:
    """A disk with a partition, and in it an ext4 file system with one file, which is `data`."""
    (folder / "tree").mkdir(parents=True)
    (folder / "tree" / "data").write_bytes(data)
    with (image := folder / "disk").open("wb") as file:
        file.truncate(24 << 20)
    subprocess.run(["sfdisk", "--quiet", image], input=b"start=2048,type=83\n", check=True, timeout=60)
    place = f"offset={PARTITION_START}"
    output_of("mke2fs", "-q", "-t", "ext4", "-d", folder / "tree", "-E", place, image, "20M")
    return image.read_bytes()


def test_linux_mounts_the_file_system_in_a_backup_and_writes_to_it(
    writer: DatastoreWriter, tmp_path: Path
) -> None:
    linux = booting.find_linux()
    need("sfdisk", "mke2fs", "busybox")
    data = random.Random(3).randbytes(4 << 20)
    path = back_up(writer, {"virtio0": linux_disk(tmp_path / "made", data)}, "memory: 256")
    modules = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
    (first := tmp_path / "initramfs").write_bytes(booting.initramfs(linux, modules, SCRIPT))
    before = files_of(writer.path)
    given = ("-kernel", linux.kernel, "-initrd", first, "-append", "console=ttyS0 quiet panic=-1")
    lines = said(writer, path, *given).splitlines()
    assert f"read: {hashlib.sha256(data).hexdigest()}  -" in lines
    assert "read back: kept" in lines
    assert files_of(writer.path) == before


# --- UEFI


def uefi_backup(writer: DatastoreWriter, variables: bytes) -> str:
    """A backup of a machine with UEFI firmware, and a disk with nothing on it."""
    disks = {"scsi0": bytes(1 << 20), "efidisk0": variables}
    return back_up(writer, disks, "bios: ovmf", "machine: q35", "memory: 128", "scsihw: virtio-scsi-pci")


@pytest.mark.parametrize("variables", ["those of the backup", "of an odd size"])
def test_uefi_firmware_starts(writer: DatastoreWriter, variables: str) -> None:
    if not VARIABLES.exists():
        pytest.skip("ovmf is not installed")
    stored = VARIABLES.read_bytes()
    kinds = {"those of the backup": stored, "of an odd size": stored[:4096]}
    path = uefi_backup(writer, kinds[variables])
    before = files_of(writer.path)
    with booted(writer, path, *NO_SCREEN) as command:
        wait_until(
            lambda: "BdsDxe: " in command.output(), "the firmware looks for something to boot", limit=40
        )
        assert "128 MiB, 1 core, UEFI" in command.errors()[-1]
        assert len(command.errors()) == (2 if variables == "of an odd size" else 1)
        assert command.stop() == 128 + signal.SIGTERM
    assert files_of(writer.path) == before


def test_who_wants_bios_gets_it(writer: DatastoreWriter, disk: BootDisk) -> None:
    path = back_up(writer, {"virtio0": disk.data}, "bios: ovmf", "memory: 64")
    assert disk.found(1) in said(writer, "--firmware", "bios", path)


# --- what cannot be booted


def test_what_is_no_machine_is_refused_in_one_line(writer: DatastoreWriter, tmp_path: Path) -> None:
    writer = stock(tmp_path / "stocked").writer
    small = {"drive-efidisk0.img.fidx": bytes(512), "qemu-server.conf.blob": b"bios: ovmf\n"}
    writer.add_snapshot(made.snapshot("102"), small)
    for path, status, reason in [
        ("vm/100", 2, f"neither a snapshot nor a disk image; it has {FIRST}, {SECOND}, latest"),
        ("vm", 2, "neither a snapshot nor a disk image; it has 100"),
        (f"vm/100/{FIRST}/qemu-server.conf", 2, "neither a snapshot nor a disk image"),
        (f"ct/200/{FIRST}/root.pxar", 2, "is not a disk of a virtual machine"),
        (f"ct/200/{FIRST}", 3, "has no disk to boot"),
        ("vm/102/latest", 3, "has no disk to boot; it has drive-efidisk0.img"),
        ("vm/102/latest/drive-efidisk0.img", 2, "is not a disk of a virtual machine"),
        ("vm/103/latest", 3, "there is no '103'"),
        ("vm/101/latest", 5, made.KEY.fingerprint[:8]),
    ]:
        assert reason in refused(writer, status, path)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "name the snapshot or image to boot"),
        (["-nographic"], "name the snapshot or image to boot"),
        (["--memory", "1", "vm/100/latest"], "--memory"),
        (["--firmware", "coreboot", "vm/100/latest"], "--firmware"),
        (["--keep", "", "vm/100/latest"], "the path is empty"),
    ],
)
def test_wrong_usage_is_status_2(writer: DatastoreWriter, arguments: list[str], reason: str) -> None:
    assert reason in refused(writer, 2, *arguments)


def folder_of_programs(folder: Path, *names: str) -> dict[str, str]:
    """An environment in which there are these programs, and no other."""
    folder.mkdir()
    for name in names:
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return environment(PATH=str(folder))


@pytest.mark.parametrize("there", [["nbdkit"], ["nbdkit", "qemu-img"], ["nbdkit", "qemu-system-x86_64"]])
def test_without_qemu_it_says_what_to_install(
    writer: DatastoreWriter, tmp_path: Path, there: list[str]
) -> None:
    told = folder_of_programs(tmp_path / "bin", *there)
    done = pbsfs("boot", "--datastore-dir", writer.path, "vm/100/latest", env=told)
    assert error_of(done, 9) == "QEMU is not installed; apt install qemu-system-x86 qemu-utils"


# --- how it ends


def test_a_failure_of_qemu_is_told_by_qemu_and_by_us(
    writer: DatastoreWriter, disk: BootDisk, tmp_path: Path
) -> None:
    path = back_up(writer, {"virtio0": disk.data}, "memory: 64")
    keep = tmp_path / "kept.qcow2"
    with booted(writer, "--keep", keep, path, "-device", "no-such-device") as command:
        assert command.ended() == 9
        assert not any("Booting" in line for line in command.errors())
        assert not keep.exists()
        assert "no-such-device" in command.errors()[-2]
        assert command.errors()[-1].startswith(
            "pbsfs: QEMU ended with status 1; correct what its own message"
        )


def endless() -> bytes:
    """A disk whose boot sector says "on" and goes on for ever."""
    code = bytes.fromhex("baf803 b06f ee b06e ee b00a ee fb f4 ebfc")
    return code.ljust(510, b"\0") + b"\x55\xaa" + bytes((1 << 20) - 512)


@pytest.mark.parametrize("way", ["Ctrl-C", "SIGTERM", "SIGHUP", "QEMU is killed", "nbdkit is killed"])
def test_nothing_is_left_however_it_ends(writer: DatastoreWriter, way: str, tmp_path: Path) -> None:
    path = back_up(writer, {"virtio0": endless()}, "memory: 64")
    with booted(writer, "--keep", tmp_path / "kept.qcow2", path, *NO_SCREEN) as command:
        assert command.line() == "on"
        (qemu,), (nbdkit,) = command.programs("qemu-system-x86"), command.programs("nbdkit")
        if way == "Ctrl-C":
            command.interrupt()
            assert command.ended() == 130
        elif way == "SIGTERM":
            assert command.stop() == 143
        elif way == "SIGHUP":
            assert command.stop(signal.SIGHUP) == 129
        elif way == "QEMU is killed":
            os.kill(qemu, signal.SIGKILL)
            assert command.ended() == 9
            assert command.errors()[-1] == "pbsfs: QEMU was ended by signal 9; start it again"
        else:
            os.kill(nbdkit, signal.SIGKILL)
            assert command.stop() == 143


def test_qemu_ends_where_pbsfs_is_killed(writer: DatastoreWriter) -> None:
    need("setpriv")
    path = back_up(writer, {"virtio0": endless()}, "memory: 64")
    with booted(writer, path, *NO_SCREEN) as command:
        assert command.line() == "on"
        command.process.kill()
        command.process.wait()
        wait_until(command.no_process_is_left, "QEMU and nbdkit end")


def files_of(folder: Path) -> dict[Path, str]:
    """All files below `folder`, by their content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

"""ISO 9660 with Rock Ridge, Joliet, or neither, of several programs; and damaged ones."""

from __future__ import annotations

import os
import random
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.contents.base import Entry
from pbsfs.disks.iso.reader import Iso
from pbsfs.disks.iso.records import joliet_name, long_time, plain_name, short_time
from pbsfs.disks.iso.rockridge import attributes
from pbsfs.disks.probe import probe
from pbsfs.disks.volume import Disk
from tests.support.disks import FileDisk, MemoryDisk, Patched, content_of, differences, fields_of
from tests.support.hostile import counts, limited, mutate
from tests.support.needs import need
from tests.support.truth import fields_at, names_below

GENISO = "genisoimage -quiet"
XORRISO = "xorriso -report_about WARNING -as mkisofs"
FORMS = (
    (f"{GENISO} -R -V A-LABEL", "Rock Ridge"),
    (f"{GENISO} -R -J -joliet-long", "Rock Ridge"),
    (f"{GENISO} -J -joliet-long", "Joliet"),
    (f"{GENISO} -iso-level 3", "ISO 9660"),
    (f"{GENISO} -R -udf -allow-limited-size", "Rock Ridge"),
    (f"{XORRISO} -R", "Rock Ridge"),
    (f"{XORRISO} -R -J -rr_reloc_dir moved", "Rock Ridge"),
)
"""Each with the names that are shown."""


def tree_in(top: Path, *, is_plain: bool = False, with_devices: bool = False) -> Path:
    """A tree; `is_plain`: of what needs no Rock Ridge."""
    some = random.Random(3)
    top.mkdir()
    for number, size in enumerate((0, 1, 2047, 2048, 2049, 100_000)):
        (top / f"file{number}.bin").write_bytes(some.randbytes(size))
    many = top / "many"
    many.mkdir()
    for number in range(300):
        (many / f"f{number}").write_bytes(b"%d" % number)
    deep = top
    for name in ("d1", "d2", "d3"):
        deep = deep / name
        deep.mkdir()
    (deep / "leaf.txt").write_bytes(b"leaf")
    os.utime(top / "file1.bin", (1, 1))
    os.utime(top / "file2.bin", (4_000_000_000, 4_000_000_000))
    if is_plain:
        return top
    for number in range(9):
        deep = deep / f"deeper-{number}"
        deep.mkdir()
        (deep / f"in-{number}").write_bytes(b"deep %d" % number)
    for length in (100, 180, 200, 250):
        (top / f"{length}{'n' * (length - 3)}").write_bytes(b"long")
    (top / "with blanks; and UPPER").write_bytes(b"x")
    (top / "n\u00e4me").write_bytes(b"x")
    for number, target in enumerate(
        ("file1.bin", "/", "/abs/olute", "../up/./x/..", "many//f1", "e" * 254, "/".join(["part"] * 50))
    ):
        (top / f"link{number}").symlink_to(target)
    os.link(top / "file5.bin", top / "many/hard")
    os.mkfifo(top / "fifo", 0o640)
    os.chmod(top / "file3.bin", 0o4751)
    if with_devices:
        os.chown(top / "file4.bin", 70_000, 80_000)
        os.mknod(top / "device", stat.S_IFBLK | 0o600, os.makedev(8, 17))
        os.mknod(top / "large", stat.S_IFCHR | 0o600, os.makedev(4, 300))
    return top


def made(tree: Path, image: Path, form: str) -> Path:
    command = form.split()
    need(command[0])
    subprocess.run([*command, "-o", str(image), str(tree)], check=True, capture_output=True)
    return image


def truth_of(tree: Path, *, is_plain: bool) -> dict[bytes, dict[str, Any]]:
    """What is to be shown of a tree. `is_plain`: without Rock Ridge, as the kernel shows it."""
    top = os.fsencode(tree)
    truth = {b"": fields_at(top)} | {path: fields_at(os.path.join(top, path)) for path in names_below(tree)}
    for fields in truth.values():
        fields["mt"] -= fields["mt"] % 10**9
        if is_plain:
            fields |= {"m": 0o555, "u": 0, "g": 0}
    return truth


def opened(disk: Any) -> Iso:
    (found,) = probe([("scsi0", Disk(disk))])
    assert found.kind == "iso9660"
    system = found.open()
    assert isinstance(system, Iso)
    return system


@pytest.mark.parametrize(("form", "names"), FORMS)
def test_all_is_as_in_the_tree_that_it_was_made_of(form: str, names: str, tmp_path: Path) -> None:
    has_all = names == "Rock Ridge"
    is_root = os.geteuid() == 0
    tree = tree_in(tmp_path / "tree", is_plain=not has_all, with_devices=has_all and is_root)
    image = made(tree, tmp_path / "image", form)
    disk = FileDisk(image)
    system = opened(disk)
    truth = truth_of(tree, is_plain=not has_all)
    moved = [path for path in (b"rr_moved", b"moved") if system.child(system.root, path) is not None]
    found = [line for line in differences(system, [disk], truth) if not moved or repr(moved[0]) not in line]
    assert found == []
    facts = system.facts()
    assert (facts["names"], facts["journal"]) == (names, "none")
    if "A-LABEL" in form:
        assert facts["label"] == "A-LABEL"


@pytest.mark.parametrize(("form", "options"), [(f"{GENISO} -R", ""), (f"{GENISO} -J", "!rockridge")])
def test_all_is_as_another_reader_extracts_it(form: str, options: str, tmp_path: Path) -> None:
    need("bsdtar")
    image = made(tree_in(tmp_path / "tree", is_plain=bool(options)), tmp_path / "image", form)
    there = tmp_path / "there"
    there.mkdir()
    command = ["bsdtar", "-xpf", str(image), "-C", str(there)]
    subprocess.run([*command, *(["--options", options] if options else [])], check=True, capture_output=True)
    truth = truth_of(there, is_plain=bool(options))
    disk = FileDisk(image)
    odd = ("b'':", "b'link6':")  # the directory that it was extracted to, and a slash too many
    but = "m,u,g,n" if os.geteuid() else "n"
    found = differences(opened(disk), [disk], truth, but=but)
    assert [line for line in found if "rr_moved" not in line and not line.startswith(odd)] == []


def test_a_file_in_several_parts_is_one(tmp_path: Path) -> None:
    """Two files that follow each other, made the parts of one."""
    tree = tmp_path / "tree"
    tree.mkdir()
    some = random.Random(1)
    parts = some.randbytes(4096), some.randbytes(5000)
    (tree / "AAAA.BIN").write_bytes(parts[0])
    (tree / "AAAB.BIN").write_bytes(parts[1])
    image = made(tree, tmp_path / "image", GENISO)
    data = bytearray(image.read_bytes())
    data[data.index(b"AAAA.BIN;1") - 8] |= 0x80
    at = data.index(b"AAAB.BIN;1")
    data[at : at + 4] = b"AAAA"
    disk = MemoryDisk(data)
    system = opened(disk)
    (file,) = system.children(system.root).entries
    assert (file.name, file.size) == (b"aaaa.bin", 9096)
    assert b"".join(content_of(system, [disk], file)) == b"".join(parts)
    data[at - 8] |= 0x80
    system = Iso(Disk(MemoryDisk(data)))
    with pytest.raises(DamageError):
        system.child(system.root, b"aaaa.bin")


def test_files_of_zisofs_are_listed_with_their_size_and_not_read(tmp_path: Path) -> None:
    need("xorriso")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/zeros").write_bytes(b"compressible" * 20_000)
    (tmp_path / "tree/plain").write_bytes(b"plain")
    image = tmp_path / "image"
    command = [
        "xorriso",
        "-report_about",
        "WARNING",
        "-outdev",
        str(image),
        "-map",
        str(tmp_path / "tree"),
        "/",
    ]
    subprocess.run([*command, "-set_filter_r", "--zisofs", "/", "--"], check=True, capture_output=True)
    disk = FileDisk(image)
    system = opened(disk)
    zeros = system.child(system.root, b"zeros")
    plain = system.child(system.root, b"plain")
    assert zeros is not None
    assert plain is not None
    assert zeros.size == 240_000
    with pytest.raises(UnsupportedError, match="compressed with zisofs"):
        system.data(zeros)
    assert fields_of(system, [disk], plain)["s"] == 5


@pytest.mark.parametrize("options", ["", "-appended_part_as_gpt", "-partition_offset 16"])
def test_an_installer_with_a_table_of_partitions_is_shown(options: str, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"file")
    efi = bytearray(1 << 20)
    efi[1080:1082] = b"\x53\xef"  # what is recognised as ext2, in the place of an EFI partition
    (tmp_path / "efi").write_bytes(efi)
    form = f"{XORRISO} -R -append_partition 2 0xef {tmp_path / 'efi'} {options}"
    disk = FileDisk(made(tmp_path / "tree", tmp_path / "image", form))
    first, second = probe([("scsi0", Disk(disk))])
    assert [(one.name, one.kind) for one in (first, second)] == [
        ("scsi0-p1", "iso9660"),
        ("scsi0-p2", "ext2"),
    ]
    system = first.open()
    file = system.child(system.root, b"file")
    assert file is not None
    assert b"".join(content_of(system, [disk], file)) == b"file"


def test_times_and_names_without_extensions() -> None:
    assert short_time(bytes((126, 11, 26, 12, 30, 5, 4))) == 1_795_696_205 - 3600
    assert short_time(bytes((126, 11, 26, 12, 30, 5, 100))) == 1_795_696_205  # an impossible zone
    assert long_time(b"2026112612300599" + bytes([256 - 4])) == 1_795_696_205 + 3600
    with pytest.raises(DamageError):
        long_time(b"20261126123005  \0")
    assert [plain_name(name) for name in (b"README.;1", b"A.B;1", b"A.B;2", b"D")] == [
        b"readme",
        b"a.b",
        b"a.b.2",
        b"d",
    ]
    assert joliet_name("Näme.txt;1".encode("utf-16-be")) == "Näme.txt".encode()
    with pytest.raises(DamageError):
        joliet_name(b"\xd8\x00\x00")


def test_entries_of_rock_ridge_that_go_on_for_ever_are_damage() -> None:
    area = b"CE\x1c\x01" + struct.pack("<I4xI4xI4x", 1, 0, 28)
    with limited(), pytest.raises(DamageError, match="too many places"):
        attributes(area, lambda _block, _offset, _size: area)
    assert attributes(b"NM\x07\x01\x01ab" + b"NM\x06\x01\x00c", lambda *_: b"").name == b"abc"
    with pytest.raises(DamageError, match="wrong length"):
        attributes(b"PX\x10\x01" + bytes(12), lambda *_: b"")


def test_a_directory_that_contains_itself_is_damage(tmp_path: Path) -> None:
    (tmp_path / "tree/aa/bb").mkdir(parents=True)
    data = bytearray(made(tmp_path / "tree", tmp_path / "image", GENISO).read_bytes())
    records = [at for at in range(len(data)) if data.startswith((b"\x02AA", b"\x02BB"), at)]
    aa, bb = (at - 32 for at in records if data[at - 32] == 36)
    data[bb + 2 : bb + 10] = data[aa + 2 : aa + 10]
    with limited():
        system = Iso(Disk(MemoryDisk(data)))
        found = list(system.walk(system.root))
    assert [path for path, entry in found if isinstance(entry, Entry)] == [b"aa"]
    assert any("is in two places" in str(entry) for _path, entry in found if isinstance(entry, DamageError))


def everything(system: Iso, disk: Any) -> Iterator[tuple[bytes, dict[str, Any] | DamageError]]:
    """All that a file system gives, or why not."""
    for path, entry in system.walk(system.root):
        if isinstance(entry, DamageError):
            yield path, entry
            continue
        try:
            if entry.is_file:
                assert sum(piece.length for piece in system.data(entry)) == entry.size
            yield path, fields_of(system, [disk], entry)
        except DamageError as error:
            yield path, error


@pytest.mark.parametrize("form", [f"{GENISO} -R", f"{GENISO} -J", f"{XORRISO} -R"])
@pytest.mark.parametrize("count", counts(40, 400))
def test_mutated_disks_raise_nothing_but_damage(count: int, form: str, tmp_path: Path) -> None:
    disk = Patched(
        FileDisk(made(tree_in(tmp_path / "tree", is_plain="-J" in form), tmp_path / "image", form))
    )
    read: set[int] = set()

    class Noting(Patched):
        def pread(self, offset: int, size: int) -> bytes:
            read.update(range(offset // 2048, -(-(offset + size) // 2048)))
            return super().pread(offset, size)

    plain = Iso(Disk(Noting(disk)))
    for _path, entry in plain.walk(plain.root):
        assert isinstance(entry, Entry)
    sectors = [sector for sector in sorted(read) if any(disk.pread(sector * 2048, 2048))]
    some = random.Random(count)
    opened_ = 0
    for _ in range(count):
        mutate(disk, lambda: some.choice(sectors) * 2048 + some.randrange(some.choice((200, 2048))), some)
        with limited():
            try:
                system = Iso(Disk(disk))
            except DamageError:
                continue
            opened_ += 1
            for _path, _found in everything(system, disk):
                pass
    assert opened_ > count // 3

"""A machine's own tree: file systems in each other, as the fstab says."""

from __future__ import annotations

import itertools
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import DECODED, Entry, Piece
from pbsfs.disks.filesystem import FileSystem
from pbsfs.disks.guest import Guest, Line, Part, parse_fstab
from pbsfs.disks.volume import Disk
from tests.support.disks import MemoryDisk

Tree = dict[str, "Tree | bytes"]


class Small(FileSystem):
    """A file system that is a tree of dictionaries."""

    kind = "ext4"

    def __init__(self, tree: Tree, uuid: str = "", label: str = "") -> None:
        super().__init__(Disk(MemoryDisk(b"")))
        self._nodes: list[Tree | bytes] = [b"", tree]
        self._told = {"uuid": uuid, "label": label}
        self.root = self.inode(1)

    def facts(self) -> dict[str, str]:
        return self._told

    def names(self, directory: Entry) -> Iterator[tuple[bytes, int, int]]:
        tree = self._nodes[directory.inode]
        assert isinstance(tree, dict)
        for name, node in tree.items():
            if not any(node is known for known in self._nodes):
                self._nodes.append(node)
            number = next(n for n, known in enumerate(self._nodes) if known is node)
            yield name.encode(), number, stat.S_IFDIR if isinstance(node, dict) else stat.S_IFREG

    def inode(self, number: int) -> Entry:
        node = self._nodes[number]
        if isinstance(node, dict):
            return Entry(b"", stat.S_IFDIR | 0o755, inode=number)
        return Entry(b"", stat.S_IFREG | 0o644, size=len(node), inode=number)

    def data(self, file: Entry, *, unconfirmed: bool = False) -> Sequence[Piece]:
        return [Piece(DECODED, 0, file.size)]

    def read(self, file: Entry, offset: int, size: int) -> bytes:
        node = self._nodes[file.inode]
        assert isinstance(node, bytes)
        return node[offset : offset + size]

    def xattrs(self, entry: Entry) -> dict[bytes, bytes]:
        return {}


@dataclass
class Machine:
    parts: list[Part] = field(default_factory=list)

    def add(self, name: str, kind: str, system: FileSystem, part_uuid: str | None = None) -> Machine:
        self.parts.append(Part(name, kind, part_uuid, lambda: system))
        return self

    def tree(self) -> Guest:
        return Guest(self.parts, [])

    def paths(self) -> dict[str, bytes | None]:
        guest = self.tree()
        found: dict[str, bytes | None] = {}
        for path, entry in guest.walk(guest.root):
            assert isinstance(entry, Entry)
            found[path.decode()] = guest.read(entry, 0, entry.size) if entry.is_file else None
        return found


def with_fstab(*lines: str, **tree: Tree | bytes) -> Small:
    return Small({"etc": {"fstab": "\n".join(lines).encode()}, **tree}, "root-uuid")


def broken() -> FileSystem:
    raise DamageError("no superblock")


def test_an_fstab_is_read_as_fstab_5_says() -> None:
    text = b"\n".join(
        [
            b"# a comment",
            b"UUID=aa / ext4 errors=remount-ro 0 1",
            b"/dev/mapper/vg-home\t/home\\040of\\040all xfs  defaults 0 2",
            b"LABEL=x /data btrfs rw,subvolid=5,subvol=/@data,noatime 0 0",
            b"LABEL=x /top btrfs subvol=/ 0 0",
            b"LABEL=x /snap btrfs rw,subvolid=258 0 0",
            b"none swap swap sw 0 0",
            b"UUID=bb /swap swap sw 0 0",
            b"server:/x /mnt nfs rw 0 0",
            b"UUID=cc /../up ext4 rw 0 0",
            b"short",
        ]
    )
    assert parse_fstab(text) == [
        Line("UUID=aa", (), None),
        Line("/dev/mapper/vg-home", (b"home of all",), None),
        Line("LABEL=x", (b"data",), b"@data"),
        Line("LABEL=x", (b"top",), b""),
        Line("LABEL=x", (b"snap",), 258),
    ]


@pytest.mark.parametrize(
    "device",
    [
        "UUID=home-uuid",
        'UUID="HOME-uuid"',
        "LABEL=Home",
        "PARTUUID=1234abcd-02",
        "/dev/mapper/vg-a--b",
        "/dev/vg/a-b",
        "/dev/disk/by-uuid/home-uuid",
        "/dev/disk/by-label/Home",
        "/dev/disk/by-partuuid/1234abcd-02",
        'PARTLABEL="disk-home"',
        r"/dev/disk/by-partlabel/disk\x2dhome",
        "/dev/disk/by-id/dm-uuid-LVM-GroupVolume",
        "/dev/disk/by-id/dm-name-vg-a--b",
    ],
)
def test_a_volume_is_mounted_where_the_fstab_names_it(device: str) -> None:
    machine = Machine().add(
        "scsi0-p1", "ext4", with_fstab(f"{device} /home ext4 rw 0 2", home={"below": b"x"})
    )
    home = Small({"jo": b"hello"}, "home-uuid", "Home")
    machine.parts.append(Part("vg-a--b", "xfs", "1234ABCD-02", lambda: home, "disk-home", "LVM-GroupVolume"))
    assert machine.paths() == {
        "etc": None,
        "etc/fstab": f"{device} /home ext4 rw 0 2".encode(),
        "home": None,
        "home/jo": b"hello",
    }
    assert machine.tree().facts() == {"root": "scsi0-p1", "mounted": "/home (vg-a--b)"}


def test_a_label_may_have_an_equals_sign() -> None:
    """udev does not escape it."""
    root = with_fstab("/dev/disk/by-label/a=b /srv ext4", "LABEL=a=b /home ext4", srv={}, home={})
    machine = Machine().add("p1", "ext4", root).add("p2", "ext4", Small({}, "", "a=b"))
    assert machine.tree().facts()["mounted"] == "/srv (p2), /home (p2)"


def test_the_root_is_what_the_fstab_of_a_copy_of_it_names() -> None:
    line = b"UUID=now / ext4 rw 0 1"
    copy = Small({"etc": {"fstab": line}, "old": b""}, "copy")
    now = Small({"etc": {"fstab": line}, "new": b""}, "now")
    machine = Machine().add("p1", "ext4", copy).add("p2", "ext4", now)
    assert set(machine.paths()) == {"etc", "etc/fstab", "new"}
    assert machine.tree().facts() == {"root": "p2"}


@pytest.mark.parametrize("other", [Small({}, "now"), None], ids=["without an fstab", "not there"])
def test_a_root_stays_where_its_fstab_names_no_system(other: Small | None) -> None:
    machine = Machine().add("p1", "ext4", Small({"etc": {"fstab": b"UUID=now / ext4 rw 0 1"}}, "restored"))
    if other is not None:
        machine.add("p2", "ext4", other)
    machine.add("p3", "ext4", Small({"etc": {"fstab": b""}}, "else"))
    assert machine.tree().facts() == {"root": "p1"}


def test_a_root_stays_where_what_its_fstab_names_may_be_damaged() -> None:
    machine = Machine().add("p1", "ext4", Small({"etc": {"fstab": b"UUID=now / ext4 rw 0 1"}}, "restored"))
    machine.parts.append(Part("p2", "xfs", None, broken))
    assert machine.tree().facts() == {"root": "p1"}


def test_mounts_lie_in_mounts_in_whatever_order_they_stand() -> None:
    root = with_fstab("UUID=log /var/log ext4 rw", "UUID=var /var ext4 rw", var={})
    machine = Machine().add("p1", "ext4", root)
    machine.add("p2", "ext4", Small({"log": {}}, "var")).add("p3", "ext4", Small({"syslog": b"1"}, "log"))
    assert machine.paths()["var/log/syslog"] == b"1"


def test_a_subvolume_is_mounted_and_may_be_the_root() -> None:
    fstab = b"UUID=one / btrfs subvol=@ 0 0\nUUID=one /home btrfs subvol=/@home 0 0"
    disk = Small({"@": {"etc": {"fstab": fstab}, "home": {}}, "@home": {"jo": b"1"}}, "one")
    assert set(Machine().add("p1", "btrfs", disk).paths()) == {"etc", "etc/fstab", "home", "home/jo"}


@pytest.mark.parametrize("device", ["UUID=one /mnt/top btrfs subvol=/", "UUID=one /mnt/top btrfs subvol=@"])
def test_a_file_system_that_is_mounted_in_itself_has_an_end(device: str) -> None:
    """As for the programs that make snapshots of btrfs. mount(8) shows no mount in another one either."""
    fstab = f"UUID=one / btrfs subvol=@\n{device}".encode()
    disk = Small({"@": {"etc": {"fstab": fstab}, "mnt": {"top": {}}}}, "one")
    guest = Machine().add("p1", "btrfs", disk).tree()
    again = b"mnt/top/@" if device.endswith("/") else b"mnt/top"
    found = [path for path, _entry in itertools.islice(guest.walk(guest.root), 100)]
    assert len(found) < 100
    assert found[-2:] == [again + b"/mnt", again + b"/mnt/top"]
    inodes = [entry.inode for _path, entry in guest.walk(guest.root) if isinstance(entry, Entry)]
    assert len(inodes) == len(set(inodes))


def test_a_volume_that_cannot_be_read_any_more_leaves_the_others_their_inodes() -> None:
    """The next process gets the inodes that this one has given."""
    root = with_fstab("/dev/mapper/a /a ext4", "/dev/mapper/b /b ext4", a={}, b={})
    first, second = Small({"x": b"1"}), Small({"x": b"2"})
    machine = Machine().add("root", "ext4", root).add("a", "ext4", first).add("b", "ext4", second)
    guest = machine.tree()
    directory = guest.child(guest.root, b"b")
    assert directory is not None
    file = guest.child(directory, b"x")
    assert file is not None
    machine.parts[1] = Part("a", "ext4", None, broken)
    assert machine.tree().child(directory, b"x") == file
    assert machine.tree().read(file, 0, 1) == b"2"


class WithSubvolumes(Small):
    """A file system with subvolumes by number; the default one has the number None."""

    def __init__(self, tree: Tree, uuid: str, **paths: str) -> None:
        super().__init__(tree, uuid)
        self._paths = paths

    def subvolume(self, number: int | None) -> Entry | None:
        here: Entry | None = self.root
        path = self._paths.get(f"number_{number}")
        for step in path.split("/") if path else []:
            assert here is not None
            here = self.child(here, step.encode())
        return None if path is None else here


def test_a_subvolume_is_mounted_by_its_number_and_the_default_one_without() -> None:
    """As after a rollback of snapper: the default subvolume is another than the first."""
    fstab = b"UUID=one / btrfs defaults\nUUID=one /home btrfs subvolid=300\nUUID=one /none btrfs subvolid=9"
    roots: Tree = {
        "1": {"etc": {"fstab": b""}, "old": b""},
        "7": {"etc": {"fstab": fstab}, "home": {}, "none": {}},
    }
    disk = WithSubvolumes({"@": roots, "homes": {"jo": b"1"}}, "one", number_None="@/7", number_300="homes")
    machine = Machine().add("p1", "btrfs", disk)
    assert set(machine.paths()) == {"etc", "etc/fstab", "home", "home/jo", "none"}
    assert machine.tree().facts()["not_mounted"] == "/none (UUID=one)"


def test_what_is_not_on_the_disks_is_told() -> None:
    root = with_fstab(
        "UUID=gone /srv ext4 rw", "/dev/sdb1 /old ext4 rw", "UUID=root-uuid /no ext4 rw", srv={}
    )
    told = Machine().add("p1", "ext4", root).tree().facts()
    assert told["not_mounted"] == "/srv (UUID=gone), /old (/dev/sdb1), /no (UUID=root-uuid)"


def test_a_volume_that_cannot_be_opened_costs_only_itself() -> None:
    machine = Machine().add("p1", "ext4", with_fstab("/dev/mapper/p2 /srv ext4 rw", srv={"mine": b""}))
    machine.parts += [Part("p0", "ext4", None, broken), Part("p2", "xfs", None, broken)]
    check_that_srv_fails(machine, "p2: no superblock")


def check_that_srv_fails(machine: Machine, why: str) -> None:
    """What the root has below a volume that can't be read is not shown for what is on the volume."""
    guest = machine.tree()
    found = {path: str(entry) for path, entry in guest.walk(guest.root) if isinstance(entry, DamageError)}
    assert found == {b"srv": why}
    assert {path for path, entry in guest.walk(guest.root)} == {b"etc", b"etc/fstab", b"srv"}
    srv = guest.child(guest.root, b"srv")
    assert srv is not None
    for name in (b"mine", b"other"):
        with pytest.raises(DamageError, match=why):
            guest.child(srv, name)
    assert guest.facts()["not_mounted"] == f"/srv ({why})"


@pytest.mark.parametrize("device", ["UUID=lost", "LABEL=lost", "/dev/disk/by-uuid/lost"])
def test_a_volume_whose_name_damage_hides_is_not_taken_for_absent(device: str) -> None:
    machine = Machine().add("p1", "ext4", with_fstab(f"{device} /srv ext4 rw", srv={"mine": b""}))
    machine.parts.append(Part("p2", "xfs", None, broken))
    check_that_srv_fails(machine, "p2: no superblock")


@pytest.mark.parametrize("kind", ["ext4", "ntfs"])
def test_a_machine_whose_root_is_damaged_does_not_look_empty(kind: str) -> None:
    machine = Machine([Part("p1", kind, None, broken)])
    guest = machine.tree()
    ((path, error),) = guest.walk(guest.root)
    assert (path, str(error)) == (b"", "p1: no superblock")
    with pytest.raises(DamageError, match="p1: no superblock"):
        guest.child(guest.root, b"etc")


def test_a_damaged_drive_leaves_the_others() -> None:
    machine = Machine().add("p1", "ntfs", Small({"Windows": {"System32": {}}}))
    machine.parts.append(Part("p2", "ntfs", None, broken))
    machine.add("p3", "ntfs", Small({}))
    guest = machine.tree()
    found = guest.children(guest.root)
    assert [entry.name for entry in found.entries] == [b"C", b"E"]
    assert str(found.damage) == "p2: no superblock"
    assert guest.child(guest.root, b"C") is not None


def test_windows_has_drives() -> None:
    windows = Small({"Windows": {"System32": {}}, "Users": {}})
    machine = Machine().add("p1", "vfat", Small({"EFI": {}})).add("p2", "ntfs", Small({"a": b"1"}))
    machine.add("p3", "ntfs", windows)
    assert set(machine.paths()) == {"C", "C/Windows", "C/Windows/System32", "C/Users", "D", "D/a"}
    assert machine.tree().facts() == {"drive_c": "p3", "drive_d": "p2"}


@pytest.mark.parametrize("path", ["WINDOWS/system32", "WINNT/System32", "windows/SYSTEM32"])
def test_windows_is_found_whatever_letters_it_is_written_in(path: str) -> None:
    first, second = path.split("/")
    machine = Machine().add("p1", "vfat", Small({"efi": {}})).add("p2", "ntfs", Small({first: {second: {}}}))
    assert machine.tree().facts() == {"drive_c": "p2"}


def test_disks_of_data_alone_have_an_empty_tree() -> None:
    machine = Machine().add("p1", "ext4", Small({"data": b"1"}))
    assert machine.paths() == {}
    assert machine.tree().facts()["root"].startswith("none")

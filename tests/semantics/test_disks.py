"""What docs/semantics.md promises of the files in disk images, on every source: a test for each promise."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from pbsfs.formats.index import FixedIndex
from pbsfs.testing.writer import DatastoreWriter
from tests.disks.ext_images import Journaled
from tests.support import made
from tests.support.damage import flip_bit
from tests.support.damaged_disk import Damaged
from tests.support.disks import ext4_of, partitioned
from tests.support.mounts import Mounted, fails_with
from tests.support.program import PBSFS, output_of, pbsfs
from tests.support.serving import access, serving

pytestmark = pytest.mark.mount

SNAPSHOT = "files/vm/100/2023-11-14T22:13:20Z"
IMAGE = "vm/100/2023-11-14T22:13:20Z/drive-scsi0.img"

Mount = Callable[..., AbstractContextManager[Mounted]]


@pytest.fixture
def mount(mount_with_files: Mount, tmp_path: Path) -> Mount:
    """Mounts a backup of a machine whose root has changes in its journal: from a directory or a server."""
    place = tmp_path / "disk"
    place.mkdir()
    disk = Journaled(place)
    tree = place / "etc"
    (tree / "more").mkdir(parents=True)
    (tree / "fstab").write_text("LABEL=none /srv ext4 rw 0 2\n")
    commands = "mkdir etc\nmkdir etc/more\ncd etc\n" + f"write {tree / 'fstab'} fstab\n"
    output_of("debugfs", "-w", "-f", "/dev/stdin", str(disk.image), stdin=None, input=commands)
    disk.write(({1: b"n" * 1024}, []), checksums=True)
    writer = DatastoreWriter(tmp_path / "store")
    image = partitioned(disk.image.read_bytes())
    writer.add_snapshot(made.snapshot("100"), {"drive-scsi0.img.fidx": image})
    return partial(mount_with_files, writer.path)


def test_volumes_are_directories_below_files(mount: Mount) -> None:
    with mount() as found:
        assert set(os.listdir(found / SNAPSHOT)) == {"guest", "index.json", "scsi0-p1", "scsi0-p2.txt"}
        assert set(os.listdir(found / f"{SNAPSHOT}/guest")) == {"etc", "file", "lost+found"}
        for volume in ("guest", "scsi0-p1"):
            fstab = found / f"{SNAPSHOT}/{volume}/etc/fstab"
            assert fstab.read_text() == "LABEL=none /srv ext4 rw 0 2\n"
        assert "LUKS" in (found / f"{SNAPSHOT}/scsi0-p2.txt").read_text()


def test_open_journals_are_applied(mount: Mount) -> None:
    with mount() as found:
        content = (found / f"{SNAPSHOT}/scsi0-p1/file").read_bytes()
        assert content == b"A" * 1024 + b"n" * 1024 + b"C" * 1024 + b"D" * 1024


def test_volumes_have_attributes_that_are_not_listed(mount: Mount) -> None:
    with mount() as found:
        volume = found / f"{SNAPSHOT}/scsi0-p1"
        told = {name: os.getxattr(volume, f"user.pbs.{name}") for name in ("file_system", "journal", "size")}
        assert told["file_system"] in (b"ext3", b"ext4")
        assert told["journal"].startswith(b"replayed: ")
        assert int(told["size"]) > 0
        assert not [name for name in os.listxattr(volume) if name.startswith("user.pbs.")]
        for path, name in ((volume, "other"), (volume / "etc", "file_system"), (volume / "file", "size")):
            with pytest.raises(OSError, match="No data available"):
                os.getxattr(path, f"user.pbs.{name}")


def test_a_disk_whose_table_is_damaged_cannot_be_entered(mount: Mount, tmp_path: Path) -> None:
    (path,) = (tmp_path / "store").glob("vm/100/*/drive-scsi0.img.fidx")
    digest = FixedIndex(path.read_bytes()).digest(0).hex()
    flip_bit(tmp_path / "store/.chunks" / digest[:4] / digest, 999)
    with mount() as found:
        assert "scsi0" in os.listdir(found / SNAPSHOT)
        assert fails_with(errno.EIO, lambda: os.listdir(found / f"{SNAPSHOT}/scsi0"))
        assert found.log_lines()


def test_damage_never_makes_the_tree_of_a_machine_look_empty(mount: Mount, tmp_path: Path) -> None:
    """Of `vm/102`, the root directory of the machine is damaged, and of `vm/103` the volume at its /srv."""
    place = tmp_path / "two"
    (place / "root" / "etc").mkdir(parents=True)
    (place / "root" / "srv").mkdir()
    (place / "root" / "etc" / "fstab").write_text("LABEL=data /srv ext4 rw 0 2\n")
    root = ext4_of(place / "root", place / "root.img")
    (place / "root" / "more").touch()
    other_root = ext4_of(place / "root", place / "root.img")
    data = Journaled(place, "-L", "data").image
    found = re.search(r"at block (\d+)", output_of("debugfs", "-R", "imap <2>", data))
    assert found is not None
    writer = DatastoreWriter(tmp_path / "store")
    for number, first, disk, offset in (
        ("102", root, "drive-scsi0", root.index(b"lost+found")),
        ("103", other_root, "drive-scsi1", int(found[1]) * 1024),
    ):
        disks: dict[str, bytes | Path] = {"drive-scsi0.img.fidx": first, "drive-scsi1.img.fidx": data}
        path = writer.add_snapshot(made.snapshot(number), disks, chunk_size=1 << 16)
        index = FixedIndex((path / f"{disk}.img.fidx").read_bytes())
        writer.chunk_path(index.digest(index.find(offset))).unlink()
    with mount() as mounted:
        root_of, data_of = (mounted / f"{SNAPSHOT}/guest".replace("100", n) for n in ("102", "103"))
        assert fails_with(errno.EIO, lambda: os.listdir(root_of))
        assert fails_with(errno.EIO, lambda: os.stat(root_of / "etc"))
        assert set(os.listdir(data_of)) == {"etc", "lost+found", "more", "srv"}
        assert fails_with(errno.EIO, lambda: os.listdir(data_of / "srv"))
        assert mounted.log_lines()


def test_commands_find_each_file_of_a_disk_once(mount: Mount, tmp_path: Path) -> None:
    with mount() as found:
        words = ("--datastore-dir", tmp_path / "store", "--name", "fstab")
        assert (found / f"{SNAPSHOT}/guest/etc/fstab").exists()
        assert output_of(PBSFS, "find", *words, "files/vm") == f"{SNAPSHOT}/scsi0-p1/etc/fstab\n"
        inside = f"{SNAPSHOT}/guest/etc"
        assert output_of(PBSFS, "find", *words, inside) == f"{inside}/fstab\n"


def test_verify_names_the_files_on_a_disk_that_damage_hits(tmp_path: Path) -> None:
    damaged = Damaged(tmp_path)
    (chunk, files), *_others = damaged.chunks().items()
    damaged.lose(chunk)
    (found,) = damaged.verify()
    assert set(found["files"]) == files
    with serving(damaged.writer.path) as server:
        (found,) = json.loads(pbsfs("verify", "--json", env=access(server)).stdout)["damaged"]
    assert set(found["files"]) == files


def parsers(pid: int) -> list[int]:
    """The processes that a mount's process has started."""
    found = list[int]()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended meanwhile
            found += map(int, (task / "children").read_text().split())
    return found


def test_disks_are_parsed_apart(mount: Mount) -> None:
    with mount() as found:
        assert os.listdir(found / f"{SNAPSHOT}/scsi0-p1")
        (parser,) = parsers(found.pid)
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{parser}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert status["NoNewPrivs"] == "1"
        if os.geteuid() == 0:
            assert status["Uid"].split() == ["65534"] * 4
        with killing(found.pid):
            assert fails_with(errno.EIO, lambda: os.listdir(found / f"{SNAPSHOT}/scsi0-p1/etc"))
            with (found / IMAGE).open("rb") as image:
                assert image.read(512)[510:] == b"\x55\xaa"
        assert os.listdir(found / f"{SNAPSHOT}/scsi0-p1/etc") == ["more", "fstab"]
        (line,) = found.log_lines()
        assert "the process that reads its file systems failed" in line


@contextmanager
def killing(pid: int) -> Iterator[None]:
    """Kills what a mount's process has started and starts."""
    begun, ended = threading.Event(), threading.Event()

    def kill() -> None:
        while not ended.is_set():
            for parser in parsers(pid):
                with suppress(ProcessLookupError):
                    os.kill(parser, signal.SIGKILL)
            begun.set()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        begun.wait()  # else the process that runs may answer before it dies
        yield
    finally:
        ended.set()
        killer.join()

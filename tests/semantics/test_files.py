"""What docs/semantics.md promises of the files in archives, on every source: a test for each promise."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

from pbsfs.formats.index import DynamicIndex
from pbsfs.testing.archives import Node, write, write_catalog
from pbsfs.testing.writer import DatastoreWriter
from tests.contents.trees import directory, expected, file, some
from tests.support import made
from tests.support.mounts import Mounted, fails_with, mounted
from tests.support.program import PBSFS, environment, output_of
from tests.support.serving import access, serving
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mount

MIB = 1 << 20
SNAPSHOT = "files/ct/200/2023-11-14T22:13:20Z"
OTHER = "files/host/pc/2023-11-14T22:13:20Z"
SPARSE = made.image(1, "r" + "0" * 40 + "r", tail=77)

Mount = Callable[..., AbstractContextManager[Mounted]]


def version_2(root: Node) -> dict[str, bytes]:
    written = write(root, split=True)
    assert written.payload is not None
    return {"root.mpxar.didx": written.main, "root.ppxar.didx": written.payload}


def version_1(root: Node) -> dict[str, bytes]:
    return {
        "root.pxar.didx": write(root, split=False).main,
        "catalog.pcat1.didx": write_catalog({b"root.pxar.didx": root}),
    }


def large() -> Node:
    """Files of several chunks, in directories."""
    files = [file(b"f%d" % number, made.image(number, "rrrrrr", tail=number)) for number in range(12)]
    return directory(b"", directory(b"a", *files[:6]), directory(b"b", *files[6:]), file(b"sparse", SPARSE))


@pytest.fixture
def writer(tmp_path: Path) -> DatastoreWriter:
    """`ct/200` is of version 2, `host/pc` of version 1."""
    made_here = DatastoreWriter(tmp_path / "store")
    made_here.add_snapshot(made.snapshot("200", type="ct"), version_2(some()))
    made_here.add_snapshot(made.snapshot("pc", type="host"), version_1(some()))
    return made_here


@pytest.fixture
def mount(mount_with_files: Mount, writer: DatastoreWriter) -> Mount:
    """Mounts the datastore, read from its directory or from a server."""
    return partial(mount_with_files, writer.path, "-o", "noignore_permissions")


def digests(writer: DatastoreWriter, group: str, stream: str) -> list[bytes]:
    path = writer.path / group / "2023-11-14T22:13:20Z" / f"{stream}.didx"
    index = DynamicIndex(path.read_bytes())
    return [index.digest(number) for number in range(index.count)]


def fields(path: bytes) -> tuple[object, ...]:
    """What `expected` has of an entry, as the kernel shows it."""
    status = os.lstat(path)
    kind = stat.S_IFMT(status.st_mode)
    names = {*map(os.fsencode, os.listxattr(path, follow_symlinks=False))}
    for name in (b"system.posix_acl_access", b"system.posix_acl_default"):
        try:
            os.getxattr(path, name, follow_symlinks=False)
        except OSError:
            names.discard(name)
        else:
            names.add(name)
    return (
        *(status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_size, status.st_rdev),
        os.readlink(path) if kind == stat.S_IFLNK else None,
        {name: os.getxattr(path, name, follow_symlinks=False) for name in names},
        Path(os.fsdecode(path)).read_bytes() if kind == stat.S_IFREG else b"",
        status.st_nlink,
    )


def below(root: Path) -> dict[bytes, bytes]:
    """The paths of all that is below a directory, relative to it, and whole."""
    found = {b"": os.fsencode(root)}
    for folder, directories, files in os.walk(os.fsencode(root)):
        for name in directories + files:
            path = os.path.join(folder, name)
            found[os.path.relpath(path, os.fsencode(root))] = path
    return found


def test_archives_are_directories_below_files(mount: Mount) -> None:
    with mount() as found:
        assert set(os.listdir(found.place)) == {"ct", "files", "host"}
        assert set(os.listdir(found / "files")) == {"ct", "host"}
        assert set(os.listdir(found / SNAPSHOT)) == {"index.json", "root"}
        assert set(os.listdir(found / OTHER)) == {"index.json", "root"}
        assert set(os.listdir(found / OTHER.removeprefix("files/"))) == {
            "catalog.pcat1",
            "index.json",
            "root.pxar",
        }
        assert os.listdir(found / "files/ct/200/latest/root/inner")
    with mount("-o", "nofiles") as found:
        assert set(os.listdir(found.place)) == {"ct", "host"}
        assert fails_with(errno.ENOENT, lambda: os.listdir(found / "files"))


def test_entries_are_as_they_were_stored(mount: Mount) -> None:
    with mount() as found:
        for snapshot in (SNAPSHOT, OTHER):
            paths = below(found / f"{snapshot}/root")
            assert {path: fields(whole) for path, whole in paths.items()} == expected(some())


def test_names_of_one_file_are_one_inode(mount: Mount) -> None:
    with mount() as found:
        for snapshot in (SNAPSHOT, OTHER):
            root = found / f"{snapshot}/root"
            names = [root / "first", root / "inner/again", Path(os.fsdecode(bytes(root) + b"/\xfe\x01"))]
            assert len({name.stat().st_ino for name in names}) == 1
            assert [name.stat().st_nlink for name in names] == [3, 3, 3]
            assert (root / "inner/last").stat().st_ino != names[0].stat().st_ino


def test_files_belong_to_who_mounts_them(mount: Mount) -> None:
    with mount("-o", "ignore_permissions,uid=1234,gid=4321") as found:
        for snapshot in (SNAPSHOT, OTHER):
            shown = below(found / f"{snapshot}/root")
            for path, whole in shown.items():
                mode, status = expected(some())[path][0], os.lstat(whole)
                assert (status.st_uid, status.st_gid) == (1234, 4321)
                if not stat.S_ISLNK(mode):
                    assert status.st_mode == mode | (0o500 if stat.S_ISDIR(mode) else 0o400)


def test_archives_give_no_privileges(mount: Mount) -> None:
    with mount() as found:
        line = next(
            line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(found.place) in line
        )
        assert {"nosuid", "nodev", "ro"} <= set(line.split()[5].split(","))
        assert fails_with(errno.EACCES, lambda: os.open(found / f"{SNAPSHOT}/root/null", os.O_RDONLY))


def test_links_in_archives_are_shown_as_they_are(
    writer: DatastoreWriter, tmp_path: Path, mount: Mount
) -> None:
    link = stat.S_IFLNK | 0o777
    root = directory(
        b"",
        directory(
            b"etc", file(b"passwd", b"of the backup"), Node(b"up", link, target=b"../../../etc/passwd")
        ),
        Node(b"absolute", link, target=b"/etc/passwd"),
        Node(b"loop", link, target=b"loop"),
        Node(b"out", link, target=b"/../../../../etc/passwd"),
        Node(b"folder", link, target=b"etc"),
    )
    for version, group in ((version_1, "v1"), (version_2, "v2")):
        writer.add_snapshot(made.snapshot(group, type="host"), version(root))
    with mount() as found:
        for group in ("v1", "v2"):
            place = f"files/host/{group}/latest/root"
            assert os.readlink(found / f"{place}/absolute") == "/etc/passwd"
            assert os.readlink(found / f"{place}/out") == "/../../../../etc/passwd"
            for path in ("absolute", "out", "etc/up", "folder/passwd", "folder/up"):
                arguments = ("cat", "--datastore-dir", writer.path, f"{place}/{path}")
                assert output_of(PBSFS, *arguments) == "of the backup"
            done = subprocess.run(
                [PBSFS, "cat", "--datastore-dir", writer.path, f"{place}/loop"],
                capture_output=True,
                text=True,
                check=False,
                env=environment(),
            )
            assert done.returncode == 3
            assert "more than 40 symbolic links" in done.stderr


def test_files_in_archives_keep_their_holes(writer: DatastoreWriter, tmp_path: Path, mount: Mount) -> None:
    for version, group in ((version_1, "v1"), (version_2, "v2")):
        writer.add_snapshot(made.snapshot(group, type="host"), version(large()))
    with mount() as found:
        for group in ("v1", "v2"):
            path = found / f"files/host/{group}/latest/root/sparse"
            assert path.read_bytes() == SPARSE
            with path.open("rb") as opened:
                hole = os.lseek(opened.fileno(), 0, os.SEEK_HOLE)
                data = os.lseek(opened.fileno(), hole, os.SEEK_DATA)
                assert SPARSE[hole:data].strip(b"\0") == b""
                assert data - hole > MIB
                assert os.lseek(opened.fileno(), data, os.SEEK_HOLE) == len(SPARSE)
            assert path.stat().st_blocks * 512 < len(SPARSE) - MIB
            copy = tmp_path / f"copy-{group}"
            output_of("cp", path, copy)
            assert copy.read_bytes() == SPARSE
            assert copy.stat().st_blocks * 512 < len(SPARSE) - MIB


def test_nothing_is_opened_before_somebody_enters(writer: DatastoreWriter, tmp_path: Path) -> None:
    with (
        serving(writer.path) as server,
        mounted(access(server), tmp_path / "m", "--connections", "1", files=True) as found,
    ):
        for group in ("ct/200", "host/pc"):
            assert len(os.listdir(found / f"files/{group}")) == 2
            assert "root" in os.listdir(found / f"files/{group}/latest")
        assert server.sessions.all() == []
        assert (found / f"{SNAPSHOT}/root/first").read_bytes() == b"the first file"
        assert len(server.sessions.all()) == 1


def readable(path: Path) -> bytes | None:
    """What a file holds; None where reading fails with EIO."""
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return None


def test_damage_in_an_archive_costs_what_it_hits(writer: DatastoreWriter, mount: Mount) -> None:
    root = large()
    writer.add_snapshot(made.snapshot("v1", type="host"), version_1(root))
    writer.add_snapshot(made.snapshot("v2", type="host"), version_2(root))
    for group, stream in (("v1", "root.pxar"), ("v2", "root.ppxar")):
        path = writer.path / f"host/{group}/2023-11-14T22:13:20Z/{stream}.didx"
        index = DynamicIndex(path.read_bytes())
        writer.chunk_path(index.digest(index.find(MIB))).unlink(missing_ok=True)
    with mount() as found:
        for group in ("v1", "v2"):
            place = found / f"files/host/{group}/latest/root"
            lost = []
            for folder in root.children[:2]:
                for child in folder.children:
                    data = readable(place / os.fsdecode(folder.name) / os.fsdecode(child.name))
                    assert data in (None, child.data)
                    lost += [child.name] if data is None else []
            assert 1 <= len(lost) <= 4
        lines = [line.partition(" ERROR ")[2] for line in found.log_lines()]
        assert all("chunk" in line for line in lines)
        assert len(lines) == len(set(lines))
        assert sum(line.startswith("host/v2/") for line in lines) == 1  # however many files it hits


def test_a_damaged_directory_can_be_entered_by_its_name_in_the_catalog(
    writer: DatastoreWriter, mount: Mount
) -> None:
    root = large()
    writer.add_snapshot(made.snapshot("v1", type="host"), version_1(root))
    index = DynamicIndex((writer.path / "host/v1/2023-11-14T22:13:20Z/root.pxar.didx").read_bytes())
    header = write(root, split=False).positions[root.children[1]]
    writer.chunk_path(index.digest(index.find(header))).unlink()
    with mount() as found:
        place = found / "files/host/v1/latest/root/b"
        whole = [child for child in root.children[1].children if readable(place / os.fsdecode(child.name))]
        assert len(whole) > 3
        assert found.log_lines()


def test_a_directory_with_damage_is_listed_and_then_fails(writer: DatastoreWriter, mount: Mount) -> None:
    files = [file(b"%04d-%s" % (number, b"x" * 200), b"") for number in range(4000)]
    writer.add_snapshot(
        made.snapshot("many", type="host"), version_2(directory(b"", directory(b"d", *files)))
    )
    chunks = digests(writer, "host/many", "root.mpxar")
    assert len(chunks) > 2
    writer.chunk_path(chunks[1]).unlink()
    with mount() as found:
        place = found / "files/host/many/latest/root/d"
        names: list[str] = []
        with os.scandir(place) as entries:
            assert fails_with(errno.EIO, lambda: names.extend(entry.name for entry in entries))
        assert 100 < len(names) < 4000
        assert (place / names[0]).read_bytes() == b""
        hidden = next(os.fsdecode(child.name) for child in files if os.fsdecode(child.name) not in names)
        assert fails_with(errno.EIO, lambda: os.stat(place / hidden))
        assert len(found.log_lines()) >= 1


def test_zeros_never_stand_for_metadata(writer: DatastoreWriter, mount: Mount) -> None:
    writer.add_snapshot(made.snapshot("v2", type="host"), version_2(large()))
    (metadata, *_others) = digests(writer, "host/v2", "root.mpxar")
    index = DynamicIndex((writer.path / "host/v2/2023-11-14T22:13:20Z/root.ppxar.didx").read_bytes())
    writer.chunk_path(index.digest(index.find(MIB))).unlink()
    with mount("--on-damage", "zero") as found:
        place = found / "files/host/v2/latest/root"
        for folder in large().children[:2]:
            for child in folder.children[1:4]:
                data = (place / os.fsdecode(folder.name) / os.fsdecode(child.name)).read_bytes()
                assert len(data) == len(child.data)
                assert all(a in (0, b) for a, b in zip(data, child.data, strict=True))
        assert any("zeros" in line for line in found.log_lines())
    writer.chunk_path(metadata).unlink()
    with mount("--on-damage", "zero") as found:
        place = found / "files/host/v2/latest/root"
        assert fails_with(errno.EIO, lambda: os.listdir(place))
        assert found.log_lines()


def test_an_archive_that_was_made_again_has_other_inodes(
    writer: DatastoreWriter, tmp_path: Path, mount: Mount
) -> None:
    with mount("--refresh", "0.1") as found:
        place = found / f"{SNAPSHOT}/root"
        before = (place / "first").stat().st_ino
        assert (place / "first").read_bytes() == b"the first file"
        replaced = directory(b"", file(b"first", b"another file!!", mtime_ns=1_700_000_000_123_456_789))
        snapshot = writer.snapshot_path(made.snapshot("200", type="ct"))
        for stored in snapshot.iterdir():
            stored.unlink()
        snapshot.rmdir()
        writer.add_snapshot(made.snapshot("200", type="ct"), version_2(replaced))
        wait_until(lambda: set(os.listdir(place)) == {"first"}, "the new archive is listed")
        assert (place / "first").read_bytes() == b"another file!!"
        assert (place / "first").stat().st_ino != before
